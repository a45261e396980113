# SPDX-License-Identifier: Apache-2.0
"""Reload and round trip."""
