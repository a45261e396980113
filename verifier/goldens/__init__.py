# SPDX-License-Identifier: Apache-2.0
"""Accepted records that runs are compared with, and how a person reviews and accepts new ones."""

from verifier.goldens.comparison import GoldenComparison, compare, compare_with_golden
from verifier.goldens.store import Golden, Pending, accept, golden_of, reject

__all__ = [
    "Golden",
    "GoldenComparison",
    "Pending",
    "accept",
    "compare",
    "compare_with_golden",
    "golden_of",
    "reject",
]
