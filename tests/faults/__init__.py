# SPDX-License-Identifier: Apache-2.0
"""Commands on a machine that fails: unreadable sectors, limits, signals; 100 exports in a row."""
