# SPDX-License-Identifier: Apache-2.0
"""Hostile checkpoints: headers, index and configs mutated in structure and in bytes, and judged in
process.
"""
