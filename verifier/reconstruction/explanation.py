# SPDX-License-Identifier: Apache-2.0
"""Whether a method explains how a weight differs from its base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOST = 0.5
"""A weight that is farther than this from its base, relative, is not a moved one."""
LIMIT, FACTOR = 0.2, 2.0
"""What an explanation may leave of a quantized weight: this relative error, or so many times that
of ``max`` calibration."""
EXACT = 0.02
"""The same of an unquantized weight."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a method explains how a weight differs from its base.

    Attributes:
        holds: whether it does.
        error: relative error that it leaves.
        against: the evidence that contradicts it, '' without such evidence.
    """

    holds: bool
    error: float = 0.0
    against: str = ""


def all_of(parts: Iterable[Explanation]) -> Explanation:
    """Return the explanation of all parts of a weight."""
    every = list(parts)
    error = max((p.error for p in every), default=float("inf"))
    return Explanation(bool(every) and all(p.holds for p in every), error)
