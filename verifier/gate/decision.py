# SPDX-License-Identifier: Apache-2.0
"""Margins and the three outcomes of a gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from verifier.errors import UsageError
from verifier.gate.statistics import Interval

Outcome = Literal["passed", "failed", "inconclusive"]
EXIT_OF_OUTCOME: dict[str, int] = {"passed": 0, "failed": 1, "inconclusive": 3}
BUDGETS = {
    "NVFP4": 0.08, "W4A16_NVFP4": 0.08, "MXFP8": 0.01, "FP8": 0.01, "FP8_PER_CHANNEL_PER_TOKEN": 0.01, "FP8_PB_WO": 0.01,
}  # fmt: skip
"""Largest relative increase of perplexity by format. NVFP4: the published normal of MiniMax-M3 is 6.6 %
(NVIDIA/Model-Optimizer#1719); MXFP8 and FP8: an order below."""


@dataclass(frozen=True, slots=True)
class Margin:
    """The largest tolerated difference, in nats a token, and where it comes from."""

    nats: float
    source: str


def margin_of(given: str | float | None, formats: Iterable[str]) -> Margin:
    """Return the margin: ``8%`` of perplexity, ``0.05`` nats, or the widest default budget of the formats present.

    Raises:
        UsageError: no number above zero, or no default for these formats.
    """
    if given is not None:
        return _parse(str(given).strip())
    known = {f: BUDGETS[f] for f in formats if f in BUDGETS}
    if not known:
        raise UsageError("no quantized format with a default budget; give --max-increase, e.g. 8%")
    widest = max(known, key=lambda f: known[f])
    return Margin(math.log1p(known[widest]), f"default budget of {widest}, {known[widest]:.0%} of perplexity")


def _parse(text: str) -> Margin:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)(?:\s*nats)?", text)
    value = float(match[1]) if match else 0.0
    if match is None or not 0 < value < 1000:
        raise UsageError(f"--max-increase {text}: give a percentage of perplexity like 8%, or nats a token like 0.05")
    if match[2]:
        return Margin(math.log1p(value / 100), f"given, {text} of perplexity")
    return Margin(value, f"given, {text} nats a token")


def decide(interval: Interval, margin: Margin) -> Outcome:
    """Return ``passed`` when the interval's upper end is within the margin, ``failed`` when its lower end is beyond."""
    if interval.high <= margin.nats:
        return "passed"
    if interval.low > margin.nats:
        return "failed"
    return "inconclusive"
