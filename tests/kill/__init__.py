# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at any moment, and run again."""
