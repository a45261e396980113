# SPDX-License-Identifier: Apache-2.0
"""Whether the last run deviates from the ones before it, and where a series changed its level;
warnings, never a verdict.

Runs of one series score the same documents, so the interval of a single run, which shows how
documents differ, is not how runs differ. That is taken from the runs themselves: 1.4826 times the
median absolute deviation, and at least `LEAST_DIFFERENCE`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verifier.history.record import Record

LEAST_DIFFERENCE = {
    "loss": 0.001,
    "drift": 0.001,
    "kl": 0.001,
    "kl_999": 0.05,
    "kl_lower": 0.001,
    "kl_999_lower": 0.05,
    "top1": 0.002,
    "flips": 0.001,
    "errors": 0.0,
    "warnings": 0.0,
    "nonfinite": 0.0,
    "bytes": 0.0,
}
"""The measures that are watched, and the least difference that counts: nats per token (a third of
the drift margin of 0.003), shares, or counts."""
BETTER_UP = {"top1"}
SIGMAS = 3.0
TO_SIGMA = 1.4826
LAST = 10
LEAST_RUNS = 3
MAX_POINTS = 2_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class Deviation:
    """A measure of the last run that is worse than the median of the passing runs before it by
    more than ``allowed``.
    """

    run: Record
    measure: str
    value: float
    median: float
    allowed: float
    runs: int


@dataclass(frozen=True)
class LevelChange:
    """A measure changed its level at ``run``; ``because`` lists what is recorded as different from
    the run before it.
    """

    run: Record
    before: Record
    measure: str
    old: float
    new: float
    because: tuple[str, ...]


def series_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the runs of each series, in order, without errors and accepted goldens."""
    series: dict[str, list[Record]] = {}
    for record in records:
        if record.kind != "golden" and record.verdict != "error":
            series.setdefault(record.series, []).append(record)
    return series


def deviations(records: Sequence[Record], last: int = LAST) -> list[Deviation]:
    """Return the deviations of the last run of each series from at least `LEAST_RUNS` passing runs
    before it.
    """
    candidates = [
        _deviation(runs, measure, last)
        for runs in series_of(records).values()
        for measure in LEAST_DIFFERENCE
    ]
    return [deviation for deviation in candidates if deviation is not None]


def _deviation(runs: Sequence[Record], measure: str, last: int) -> Deviation | None:
    run = runs[-1]
    passing = [r for r in runs[:-1] if r.verdict == "passed" and measure in r.measures][-last:]
    if measure not in run.measures or len(passing) < LEAST_RUNS:
        return None
    before = [r.measures[measure].value for r in passing]
    value, median = run.measures[measure].value, statistics.median(before)
    allowed = max(LEAST_DIFFERENCE[measure], SIGMAS * _spread(before))
    worse = median - value if measure in BETTER_UP else value - median
    if worse <= allowed:
        return None
    return Deviation(run, measure, value, median, allowed, len(before))


def changes(records: Sequence[Record], measure: str | None = None) -> list[LevelChange]:
    """Return the change points of every series, or of one measure, among the last `MAX_POINTS`
    runs.
    """
    points: list[LevelChange] = []
    for runs in series_of(records).values():
        for name in LEAST_DIFFERENCE:
            if measure in (None, name):
                points += _changes([r for r in runs if name in r.measures][-MAX_POINTS:], name)
    return points


def _changes(runs: Sequence[Record], measure: str) -> list[LevelChange]:
    values = [run.measures[measure].value for run in runs]
    cuts = _cuts(values, 0, len(values), LEAST_DIFFERENCE[measure])
    ends = [0, *cuts, len(values)]
    points = []
    for before, cut, after in zip(ends, cuts, ends[2:], strict=False):
        old, new = statistics.median(values[before:cut]), statistics.median(values[cut:after])
        because = differences(runs[cut - 1], runs[cut])
        points.append(LevelChange(runs[cut], runs[cut - 1], measure, old, new, because))
    return points


def differences(old: Record, new: Record) -> tuple[str, ...]:
    """Return what is recorded as different between two runs, the recipe first."""
    texts = _recipe_differences(old, new)
    if old.commit != new.commit:
        texts.append(f"commit {old.commit[:12] or 'none'} → {new.commit[:12] or 'none'}")
    texts += _changed("", old.versions, new.versions)
    texts += _changed("", old.environment, new.environment)
    texts += _changed("protocol ", old.key, new.key)
    texts += ["base changed"] if _digests(old.base) != _digests(new.base) else []
    texts += ["checkpoint changed"] if _digests(old.checkpoint) != _digests(new.checkpoint) else []
    return tuple(texts)


def _digests(identity: Mapping[str, object]) -> list[object]:
    return [identity.get(name) for name in ("files_sha256", "header_sha256")]


def _recipe_differences(old: Record, new: Record) -> list[str]:
    changed = [k for k in {*old.recipe, *new.recipe} if old.recipe.get(k) != new.recipe.get(k)]
    names = sorted({*changed} - {"sha256"}, key=lambda name: (name != "recipe", name))
    return [
        f"{name if name == 'recipe' else f'recipe {name}'} "
        f"{_value(old.recipe.get(name))} → {_value(new.recipe.get(name))}"
        for name in names
    ]


def _changed(prefix: str, old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [
        f"{prefix}{name} {_value(old.get(name))} → {_value(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _value(value: object) -> str:
    return "none" if value is None else str(value)[:60]


def _spread(values: Sequence[float]) -> float:
    median = statistics.median(values)
    return TO_SIGMA * statistics.median(abs(value - median) for value in values)


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation about the levels: differences of neighbours are hardly affected
    by the steps between levels.
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return TO_SIGMA * statistics.median(steps) / 2**0.5 if steps else 0.0


def _cuts(values: Sequence[float], low: int, high: int, least: float, depth: int = 0) -> list[int]:
    """Return where levels begin in ``values[low:high]``: cut in two where the squared error falls
    most, as long as the medians of both sides differ by more than noise.

    A single run at either end is not a level, and is passed over; its deviation is reported.
    """
    if high - low < 4 or depth > MAX_DEPTH:
        return []
    cut = _best_cut(values, low, high)
    if cut is None:
        return []
    if cut - low == 1 or high - cut == 1:
        return _cuts(values, low + (cut - low == 1), high - (high - cut == 1), least, depth + 1)
    step = abs(statistics.median(values[cut:high]) - statistics.median(values[low:cut]))
    if step <= max(least, SIGMAS * _noise(values[low:high])):
        return []
    before = _cuts(values, low, cut, least, depth + 1)
    return [*before, cut, *_cuts(values, cut, high, least, depth + 1)]


def _best_cut(values: Sequence[float], low: int, high: int) -> int | None:
    """Return where cutting lowers the squared error most; None where sums exceed what a float
    holds.
    """
    count, total = high - low, sum(values[low:high])
    best, cut, left = -1.0, None, 0.0
    for i in range(low + 1, high):
        left += values[i - 1]
        n = i - low
        apart = left / n - (total - left) / (count - n)
        gain = n * (count - n) / count * apart * apart
        if gain > best:
            best, cut = gain, i
    return cut
