# SPDX-License-Identifier: Apache-2.0
"""Work in units: shares of a job array, and Ray."""
