# SPDX-License-Identifier: Apache-2.0
"""Margins and the three outcomes of a gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from verifier.errors import UsageError
from verifier.gate.statistics import Interval, documents_needed, holm, p_beyond

NORMALS = {"NVFP4": 0.0642, "W4A16_NVFP4": 0.0642}
"""Published loss of a good export, nats a token: MiniMax-M3, experts in NVFP4, 5.083 to 5.420."""
DRIFT = 0.003
"""Nats a token that a candidate may lose against an accepted run."""
Outcome = Literal["passed", "failed", "inconclusive"]
EXIT_OF_OUTCOME: dict[str, int] = {"passed": 0, "failed": 1, "inconclusive": 3}
BUDGETS = {
    "NVFP4": 0.08,
    "W4A16_NVFP4": 0.08,
    "MXFP8": 0.01,
    "FP8": 0.01,
    "FP8_PER_CHANNEL_PER_TOKEN": 0.01,
    "FP8_PB_WO": 0.01,
}
"""Largest relative increase of perplexity by format. NVFP4: the published normal of MiniMax-M3 is
6.6 % (NVIDIA/Model-Optimizer#1719); MXFP8 and FP8: an order below."""


@dataclass(frozen=True, slots=True)
class Margin:
    """The largest tolerated difference, in nats a token, and where it comes from."""

    nats: float
    source: str


def margin_of(given: str | float | None, formats: Iterable[str], *, task: bool = False) -> Margin:
    """Return the margin: ``8%`` of perplexity, ``0.05`` nats, or the widest default budget of the
    formats present.

    Of a task it is in points of accuracy, ``1%`` or ``0.01``, and has no default.

    Raises:
        UsageError: no number above zero, or no default for these formats.
    """
    if given is not None:
        return _parse(str(given).strip(), "--max-increase", task=task)
    if task:
        raise UsageError(
            "a task has no default margin; give --max-loss, e.g. 1% (points of accuracy)"
        )
    known = {f: BUDGETS[f] for f in formats if f in BUDGETS}
    if not known:
        raise UsageError("no quantized format with a default budget; give --max-increase, e.g. 8%")
    widest = max(known, key=lambda f: known[f])
    return Margin(
        math.log1p(known[widest]), f"default budget of {widest}, {known[widest]:.0%} of perplexity"
    )


def _parse(text: str, option: str, *, task: bool = False) -> Margin:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)(?:\s*nats)?", text)
    value = float(match[1]) if match else 0.0
    if match is None or not 0 < value < 1000:
        raise UsageError(
            f"{option} {text}: give a percentage of perplexity like 8%, or nats a token like 0.05"
        )
    if task:
        share = value / 100 if match[2] else value
        if share >= 1:
            raise UsageError(f"{option} {text}: give points of accuracy, 1% or 0.01")
        return Margin(share, f"given, {text} of accuracy")
    if match[2]:
        return Margin(math.log1p(value / 100), f"given, {text} of perplexity")
    return Margin(value, f"given, {text} nats a token")


def drift_margin_of(given: str | float | None, *, task: bool = False) -> Margin:
    """Return the margin against an accepted run: nats, ``0.3%`` of perplexity, or 0.003 nats.

    Raises:
        UsageError: no number above zero.
    """
    if given is None:
        return Margin(DRIFT, f"default, {DRIFT} {'of accuracy' if task else 'nats a token'}")
    return _parse(str(given).strip(), "--max-drift", task=task)


def judge(
    family: Sequence[tuple[Interval, Margin]], *, floor: float | None, widening: float, alpha: float
) -> Outcome:
    """Return the verdict on a family of measures.

    ``passed`` when every upper end is within its margin and every margin above the noise floor (all
    must hold, so nothing is corrected for); ``failed`` when Holm's procedure at ``alpha`` shows one
    mean beyond its margin.

    Args:
        family: intervals, widened already, and margins.
        floor: noise floor, nats; None where it was not measured.
        widening: by how much the intervals were widened; a mean must be beyond its margin by as
            much.
        alpha: error of the family.
    """
    if any(holm([p_beyond(i, m.nats + widening) for i, m in family], alpha)):
        return "failed"
    if all(i.high <= m.nats and (floor is None or m.nats > floor) for i, m in family):
        return "passed"
    return "inconclusive"


def documents_for(family: Sequence[tuple[Interval, Margin]]) -> int | None:
    """Return about how many documents would decide what is open; None where no number would."""
    counts = [documents_needed(i, m.nats) for i, m in family if i.high > m.nats]
    return None if not counts or None in counts else max(c for c in counts if c is not None)


def decide(interval: Interval, margin: Margin) -> Outcome:
    """Return ``passed`` when the interval's upper end is within the margin, ``failed`` when its
    lower end is beyond.
    """
    if interval.high <= margin.nats:
        return "passed"
    if interval.low > margin.nats:
        return "failed"
    return "inconclusive"
