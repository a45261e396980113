# SPDX-License-Identifier: Apache-2.0
"""A measure of a history as a time series."""

from __future__ import annotations

from collections.abc import Sequence

from verifier.errors import ContentError
from verifier.history.record import Record
from verifier.history.render import interval
from verifier.history.trend import changes
from verifier.report.figures import Point, Series, series


def draw(records: Sequence[Record], measure: str, *, standalone: bool = False) -> str:
    """Return the SVG of a measure over the runs of a history.

    Raises:
        ContentError: no run has the measure.
    """
    found: dict[str, Series] = {}
    keys: dict[str, object] = {}
    of_run: dict[str, tuple[str, int]] = {}
    for at, r in enumerate(r for r in records if measure in r.measures):
        m = r.measures[measure]
        if r.kind == "golden":
            for other, s in found.items():
                if s.name == r.name and keys[other] == r.key:
                    s.goldens.append((at, m.value))
            continue
        s = found.setdefault(r.series, Series(r.name, []))
        keys[r.series] = r.key
        of_run[r.id] = (r.series, at)
        title = f"{r.time[:16]}Z {r.id[:8]} {r.verdict} {interval(m)} {r.label} {r.commit[:10]}"
        s.points.append(Point(at, m.value, m.low, m.high, r.verdict, title))
    if not found:
        have = sorted({n for r in records for n in r.measures})
        raise ContentError(
            f"no run has the measure {measure!r}; there are {', '.join(have[:20]) or 'none'}"
        )
    for c in changes(records, measure):
        where = of_run.get(c.run.id)
        if where is not None:
            found[where[0]].changes.append(
                (where[1], "; ".join(c.because) or "nothing that is recorded changed")
            )
    return series(list(found.values()), measure, standalone=standalone)
