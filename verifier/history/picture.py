# SPDX-License-Identifier: Apache-2.0
"""A measure of a history as a time series."""

from __future__ import annotations

from collections.abc import Sequence

from verifier.errors import ContentError
from verifier.history.record import Record
from verifier.history.render import measured
from verifier.history.trend import changes
from verifier.report.figures import Point, Series, time_series
from verifier.text import listed


def draw(records: Sequence[Record], measure: str, *, standalone: bool = False) -> str:
    """Return the SVG of a measure over the runs of a history.

    Raises:
        ContentError: no run has the measure.
    """
    having = [record for record in records if measure in record.measures]
    lines: dict[str, Series] = {}
    positions: dict[str, int] = {}
    for at, record in enumerate(having):
        if record.kind == "golden":
            continue
        positions[record.id] = at
        line = lines.setdefault(record.series, Series(record.name, []))
        line.points.append(_point(at, record, measure))
    if not lines:
        names = sorted({name for record in records for name in record.measures})
        raise ContentError(
            f"no run has the measure {measure!r}; available: {listed(names, 20) or 'none'}"
        )
    _add_goldens(lines, having, measure)
    for change in changes(records, measure):
        if change.run.id in positions:
            why = "; ".join(change.because) or "nothing that is recorded changed"
            lines[change.run.series].changes.append((positions[change.run.id], why))
    return time_series(list(lines.values()), measure, standalone=standalone)


def _point(at: int, record: Record, measure: str) -> Point:
    m = record.measures[measure]
    title = (
        f"{record.time[:16]}Z {record.id[:8]} {record.verdict} {measured(m)} {record.label} "
        f"{record.commit[:10]}"
    )
    label = f"{record.label} {record.time[:10]}".strip()
    return Point(at, m.value, m.low, m.high, record.verdict, title, label)


def _add_goldens(lines: dict[str, Series], having: Sequence[Record], measure: str) -> None:
    """Add each accepted golden to the series with its name and key that began before it."""
    begun: dict[str, Record] = {}
    for at, record in enumerate(having):
        if record.kind != "golden":
            begun.setdefault(record.series, record)
            continue
        for series, first in begun.items():
            if (first.name, first.key) == (record.name, record.key):
                lines[series].goldens.append((at, record.measures[measure].value))
