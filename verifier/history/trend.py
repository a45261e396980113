# SPDX-License-Identifier: Apache-2.0
"""Whether the last run is off the ones before it, and where a series changed its level; a warning,
never a verdict.

Runs of one series score the same documents, so that the interval of a single run, which tells how
documents differ, is not how runs differ. That is told by the runs themselves: 1.4826 times the
median absolute deviation, and not less than `FLOOR`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.history.record import Record

FLOOR = {
    "loss": 0.001,
    "drift": 0.001,
    "kl": 0.001,
    "kl_999": 0.05,
    "top1": 0.002,
    "flips": 0.001,
    "errors": 0.0,
    "warnings": 0.0,
    "nonfinite": 0.0,
    "bytes": 0.0,
}
"""The measures that are watched, and the least difference that counts: nats a token (a third of the
drift margin of
0.003), shares, or counts."""
BETTER_UP = {"top1"}
SIGMAS = 3.0
TO_SIGMA = 1.4826
LAST = 10
LEAST_RUNS = 3
MAX_POINTS = 2_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class Warned:
    """A measure of the last run that is worse than the median of the accepted runs before it by
    more than ``allowed``.
    """

    run: Record
    measure: str
    value: float
    median: float
    allowed: float
    runs: int


@dataclass(frozen=True)
class Change:
    """A measure changed its level at ``run``; ``because`` names what is recorded as different from
    the run before it.
    """

    run: Record
    before: Record
    measure: str
    old: float
    new: float
    because: tuple[str, ...]


def series_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the runs of each series, in order; runs that ended in an error and accepted goldens are in none."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r.kind != "golden" and r.verdict != "error":
            found.setdefault(r.series, []).append(r)
    return found


def warnings(records: Sequence[Record], last: int = LAST) -> list[Warned]:
    """Return the warnings about the last run of each series; at least `LEAST_RUNS` passed runs must
    lie before it.
    """
    found = []
    for runs in series_of(records).values():
        run = runs[-1]
        for name, floor in FLOOR.items():
            before = [
                r.measures[name].value
                for r in runs[:-1]
                if r.verdict == "passed" and name in r.measures
            ][-last:]
            if name not in run.measures or len(before) < LEAST_RUNS:
                continue
            value, median = run.measures[name].value, statistics.median(before)
            allowed = max(floor, SIGMAS * _spread(before))
            worse = median - value if name in BETTER_UP else value - median
            if worse > allowed:
                found.append(Warned(run, name, value, median, allowed, len(before)))
    return found


def changes(records: Sequence[Record], measure: str | None = None) -> list[Change]:
    """Return the change points of every series, or of one measure; the last `MAX_POINTS` runs are
    looked at.
    """
    found = []
    for runs in series_of(records).values():
        for name, floor in FLOOR.items():
            if measure not in (None, name):
                continue
            having = [r for r in runs if name in r.measures][-MAX_POINTS:]
            values = [r.measures[name].value for r in having]
            cuts = _cuts(values, 0, len(values), floor)
            for cut, low, high in _levels(cuts, len(values)):
                old, new = statistics.median(values[low:cut]), statistics.median(values[cut:high])
                found.append(
                    Change(
                        having[cut],
                        having[cut - 1],
                        name,
                        old,
                        new,
                        differences(having[cut - 1], having[cut]),
                    )
                )
    return found


def differences(old: Record, new: Record) -> tuple[str, ...]:
    """Return what is recorded as different between two runs, recipe first."""
    found = []
    for k in sorted({*old.recipe, *new.recipe} - {"sha256"}, key=lambda k: (k != "recipe", k)):
        if old.recipe.get(k) != new.recipe.get(k):
            what = k if k == "recipe" else f"recipe {k}"
            found.append(f"{what} {_shown(old.recipe.get(k))} -> {_shown(new.recipe.get(k))}")
    if old.commit != new.commit:
        found.append(f"commit {old.commit[:12] or 'none'} -> {new.commit[:12] or 'none'}")
    for what, a, b in (
        ("", old.versions, new.versions),
        ("", old.environment, new.environment),
        ("protocol ", old.key, new.key),
    ):
        found += [
            f"{what}{k} {_shown(a.get(k))} -> {_shown(b.get(k))}"
            for k in sorted({*a, *b})
            if a.get(k) != b.get(k)
        ]
    for what, a, b in (
        ("base", old.base, new.base),
        ("checkpoint", old.checkpoint, new.checkpoint),
    ):
        if any(a.get(k) != b.get(k) for k in ("files_sha256", "header_sha256")):
            found.append(f"other {what}")
    return tuple(found)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)[:60]


def _spread(values: Sequence[float]) -> float:
    median = statistics.median(values)
    return TO_SIGMA * statistics.median(abs(v - median) for v in values)


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation about the levels: differences of neighbours hardly see the
    steps.
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return TO_SIGMA * statistics.median(steps) / 2**0.5 if steps else 0.0


def _cuts(values: Sequence[float], low: int, high: int, floor: float, depth: int = 0) -> list[int]:
    """Cut in two where the squared error falls most, as long as the medians of both sides differ by
    more than noise.

    One run by itself at an end is no level, and is passed over; the trend warns of the last one.
    """
    count = high - low
    if count < 4 or depth > MAX_DEPTH:
        return []
    best, cut, left = -1.0, 0, 0.0
    total = sum(values[low:high])
    for i in range(low + 1, high):
        left += values[i - 1]
        n = i - low
        apart = left / n - (total - left) / (count - n)
        gain = n * (count - n) / count * apart * apart
        if gain > best:
            best, cut = gain, i
    if best < 0:  # sums beyond what a float holds
        return []
    if cut - low == 1 or high - cut == 1:
        return _cuts(values, low + (cut - low == 1), high - (high - cut == 1), floor, depth + 1)
    step = abs(statistics.median(values[cut:high]) - statistics.median(values[low:cut]))
    if step <= max(floor, SIGMAS * _noise(values[low:high])):
        return []
    return [
        *_cuts(values, low, cut, floor, depth + 1),
        cut,
        *_cuts(values, cut, high, floor, depth + 1),
    ]


def _levels(cuts: Sequence[int], count: int) -> list[tuple[int, int, int]]:
    ends = [0, *cuts, count]
    return [(cut, ends[i], ends[i + 2]) for i, cut in enumerate(cuts)]
