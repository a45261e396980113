# SPDX-License-Identifier: Apache-2.0
"""Accepted records that runs are held against, and how a person reviews and accepts another one."""

from verifier.goldens.judge import GoldenComparison, hold, judge
from verifier.goldens.store import Golden, Pending, accept, proposed, reject

__all__ = ["Golden", "GoldenComparison", "Pending", "accept", "hold", "judge", "proposed", "reject"]
