# SPDX-License-Identifier: Apache-2.0
"""Bytes of tensors, read once for all rules that ask."""
