# SPDX-License-Identifier: Apache-2.0
"""The pictures of results: forest plot, documents, heat maps, time series. All are bounded in size
and have a text for readers who cannot see them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verifier.evaluation import Interval
from verifier.report import svg

MAX_ROWS = 60
MAX_BARS = 400
MAX_CELLS = 5_000
MAX_COLUMNS = 512
MAX_SERIES = 6
MAX_POINTS = 500
MAX_LABELS = 6
WORST = 10
STANDS_OUT = 0.05
"""How far the worst cell is from the median, as a share of a fixed scale, to be framed."""
ROW_HEIGHT = 36
Cells = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Figure:
    """A picture with its heading, what it shows in words, and a table below it with a caption."""

    heading: str
    words: str
    picture: str
    table: tuple[tuple[str, ...], ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a forest plot: a loss, its margin, and the verdict."""

    label: str
    interval: Interval
    margin: float
    verdict: str


@dataclass(frozen=True)
class Point:
    """One run of a time series; ``low`` and ``high`` are its interval, if any, and ``label`` is
    below the axis.
    """

    at: int
    value: float
    low: float | None
    high: float | None
    verdict: str
    title: str
    label: str = ""


@dataclass
class Series:
    """Runs of one name and protocol; (position, value) of accepted goldens, and (position, reason)
    of change points.
    """

    name: str
    points: list[Point]
    goldens: list[tuple[int, float]] = field(default_factory=list)
    changes: list[tuple[int, str]] = field(default_factory=list)


def forest(rows: Sequence[Row], unit: str) -> str:
    """Return intervals below each other with their margins; green passed, red failed, amber
    inconclusive.
    """
    rows = rows[:MAX_ROWS]
    ends = [0.0]
    for row in rows:
        ends += [row.interval.low, row.interval.high, row.interval.delta, row.margin]
    low, high = svg.bounds(ends)
    left, right, top = 250.0, svg.WIDTH - 250.0, 20.0
    x, bottom = svg.scale(low, high, left, right), top + ROW_HEIGHT * len(rows)
    parts = []
    for tick in svg.ticks(low, high):
        parts += [
            svg.line(x(tick), top, x(tick), bottom, "grid"),
            svg.text(x(tick), bottom + 16, svg.number(tick), "soft", "middle"),
        ]
    parts.append(svg.line(x(0), top, x(0), bottom, "axis"))
    for i, row in enumerate(rows):
        parts += _forest_row(row, x, top + ROW_HEIGHT * i + 20, left, right)
    parts.append(svg.text((left + right) / 2, bottom + 34, unit, "soft", "middle"))
    alt = "; ".join(map(_in_words, rows))
    return svg.plot(parts, bottom + 42, "Differences with intervals and margins", alt)


def _forest_row(row: Row, x: svg.Axis, y: float, left: float, right: float) -> list[str]:
    i = row.interval
    near = x(row.margin) > right - 100  # the row's numbers are there
    offset, anchor = (-5, "end") if near else (5, "start")
    label = f"{i.delta:+.5f} [{i.low:+.4f}, {i.high:+.4f}] {row.verdict}"
    return [
        svg.text(left - 12, y + 4, row.label, "", "end", 38),
        svg.line(x(i.low), y, x(i.high), y, f"{row.verdict} line-w"),
        svg.line(x(i.low), y - 5, x(i.low), y + 5, row.verdict),
        svg.line(x(i.high), y - 5, x(i.high), y + 5, row.verdict),
        svg.dot(x(i.delta), y, row.verdict, f"{i.delta:+.6f} [{i.low:+.6f}, {i.high:+.6f}]"),
        svg.line(x(row.margin), y - 13, x(row.margin), y + 13, "margin"),
        svg.text(x(row.margin) + offset, y - 10, f"margin {row.margin:.3g}", "soft", anchor),
        svg.text(svg.WIDTH - 4, y + 4, label, f"{row.verdict} label", "end"),
    ]


def _in_words(row: Row) -> str:
    i = row.interval
    return (
        f"{row.label}: {i.delta:+.5f}, interval {i.low:+.5f} to {i.high:+.5f}, margin "
        f"{row.margin:.5f}, {row.verdict}"
    )


def worst_of(deltas: Sequence[tuple[str, float]]) -> int:
    """Return how many documents are shown as the worst: a fifth of them, at most ten."""
    return min(WORST, max(1, len(deltas) // 5))


def documents(deltas: Sequence[tuple[str, float]], mean: float) -> str:
    """Return the loss of each document, smallest first; the worst are numbered.

    Args:
        deltas: (name of the document, its mean loss in nats per token).
        mean: the loss over all tokens; NaN where there is none.
    """
    ordered = sorted((d for d in deltas if math.isfinite(d[1])), key=lambda d: d[1])
    last = ordered[-worst_of(ordered) :]
    worst = {name for name, _ in last}
    step = max(1, math.ceil(len(ordered) / MAX_BARS))
    # Of many documents every step-th is drawn, and the worst always.
    bars = [d for i, d in enumerate(ordered) if i % step == 0 or d[0] in worst]
    low, high = svg.bounds([*(value for _, value in bars), 0.0])
    left, right, top, bottom = 70.0, svg.WIDTH - 10.0, 24.0, 250.0
    y, width = svg.scale(low, high, bottom, top), (right - left) / max(1, len(bars))
    parts = _horizontal_grid(y, low, high, left, right)
    for i, (name, value) in enumerate(bars):
        parts += _bar(left + i * width, width, y, name, value, worst=name in worst)
    parts.append(svg.line(left, y(0), right, y(0), "axis"))
    if math.isfinite(mean):
        parts += [
            svg.line(left, y(mean), right, y(mean), "golden"),
            svg.text(left + 4, y(mean) - 4, f"mean {mean:+.5f}", "soft"),
        ]
    caption = f"{len(ordered):,} documents, smallest first; nats per token"
    parts.append(svg.text((left + right) / 2, bottom + 22, caption, "soft", "middle"))
    names = ", ".join(f"{name} {value:+.5f}" for name, value in reversed(last))
    alt = f"The mean is {mean:+.5f}. The worst documents: {names}"
    return svg.plot(parts, bottom + 32, "Loss by document", alt)


def _horizontal_grid(y: svg.Axis, low: float, high: float, left: float, right: float) -> list[str]:
    parts = []
    for tick in svg.ticks(low, high):
        parts += [
            svg.line(left, y(tick), right, y(tick), "grid"),
            svg.text(left - 6, y(tick) + 4, svg.number(tick), "soft", "end"),
        ]
    return parts


def _bar(x: float, width: float, y: svg.Axis, name: str, value: float, *, worst: bool) -> list[str]:
    top, height = min(y(0), y(value)), abs(y(value) - y(0))
    kind, title = "worst" if worst else "info", f"{name}: {value:+.5f}"
    parts = [svg.rect(x + width * 0.1, top, width * 0.8, height, kind, title)]
    if worst and width >= 9:
        at_x, at_y = x + width / 2 + 3.5, y(max(value, 0)) - 4
        number = svg.text(0, 0, name.rpartition(" ")[2], "tiny", limit=8)
        parts.append(f'<g transform="translate({at_x:.1f} {at_y:.1f}) rotate(-90)">{number}</g>')
    return parts


def heat(
    cells: Cells,
    title: str,
    unit: str,
    *,
    ends: tuple[float, float] | None = None,
    low_is_bad: bool = True,
) -> str:
    """Return a heat map, rows by columns; strong is high, and the worst cell is framed where it
    stands out.

    Args:
        cells: (row, column) -> value; a map of more than 5,000 cells keeps its worst rows.
        title: what is shown.
        unit: of the values.
        ends: the values of the palest and the strongest color; those of the cells by default.
        low_is_bad: which end is the worst.
    """
    finite = {place: value for place, value in cells.items() if math.isfinite(value)}
    columns = sorted({column for _, column in finite}, key=_natural)[:MAX_COLUMNS]
    rows, dropped = _worst_rows(finite, len(columns), 1 if low_is_bad else -1)
    grid = _HeatMap(rows, columns, finite)
    if not grid.values:
        return ""
    least, most = min(grid.values.values()), max(grid.values.values())
    pale, strong = ends or (least, most)
    span = (strong - pale) or 1.0
    parts = [*grid.column_labels(), *grid.row_labels()]
    for place, value in grid.values.items():
        share = min(1.0, max(0.0, (value - pale) / span))
        parts += grid.cell(place, 0.12 + 0.5 * share, unit)
    middle = statistics.median(grid.values.values())
    away = middle - least if low_is_bad else most - middle
    if least == most or (ends and away < STANDS_OUT * span):
        summary = f"{unit}; all {least:.4g}"
        if least != most:
            summary = f"{unit} ({least:.3g} to {most:.3g}); none stands out"
    else:
        pick = min if low_is_bad else max
        worst = pick(grid.values, key=lambda place: grid.values[place])
        parts.append(grid.frame(worst))
        summary = f"{unit} ({least:.4g} to {most:.4g}); worst: {worst[0]}, {worst[1]}"
    if dropped > 0:
        summary += f"; {dropped} further rows are not shown"
    parts.append(svg.text(grid.LEFT, 20, summary, "soft"))
    alt = f"{title}, {len(rows)} rows by {len(columns)} columns: {summary}"
    return svg.plot(parts, grid.bottom + 8, title, alt)


def _worst_rows(cells: Cells, columns: int, sign: int) -> tuple[list[str], int]:
    """Return the rows that fit `MAX_CELLS`, in natural order, and how many do not."""
    rows = sorted({row for row, _ in cells}, key=_natural)
    fitting = max(1, MAX_CELLS // max(1, columns))
    if len(rows) <= fitting:
        return rows, 0
    worst: dict[str, float] = {}
    for (row, _), value in cells.items():
        worst[row] = min(sign * value, worst.get(row, math.inf))
    selected = set(sorted(rows, key=lambda row: worst[row])[:fitting])
    return [row for row in rows if row in selected], len(rows) - fitting


class _HeatMap:
    """Where the cells of a heat map are drawn."""

    LEFT, TOP = 190.0, 56.0

    def __init__(self, rows: Sequence[str], columns: Sequence[str], cells: Cells) -> None:
        self.rows = {row: i for i, row in enumerate(rows)}
        self.columns = {column: i for i, column in enumerate(columns)}
        places = [(row, column) for row in rows for column in columns]
        self.values = {place: cells[place] for place in places if place in cells}
        self.width = min(92.0, (svg.WIDTH - self.LEFT - 10) / max(1, len(columns)))
        self.height = 22.0 if len(rows) <= 64 else 9.0

    @property
    def bottom(self) -> float:
        """Where the last row ends."""
        return self.TOP + len(self.rows) * self.height

    def _corner(self, place: tuple[str, str]) -> tuple[float, float]:
        row, column = self.rows[place[0]], self.columns[place[1]]
        return self.LEFT + column * self.width, self.TOP + row * self.height

    def column_labels(self) -> list[str]:
        """Return the columns' names, as many as there is room for."""
        every = 1 if self.width >= 40 else max(1, math.ceil(30 / self.width))
        limit = max(3, int(self.width / 6))
        return [
            svg.text(
                self.LEFT + (i + 0.5) * self.width, self.TOP - 8, name, "soft tiny", "middle", limit
            )
            for name, i in self.columns.items()
            if i % every == 0
        ]

    def row_labels(self) -> list[str]:
        """Return the rows' names, as many as there is room for."""
        every = 1 if self.height > 12 else 2
        return [
            svg.text(
                self.LEFT - 8, self.TOP + (i + 0.7) * self.height, name, "soft tiny", "end", 30
            )
            for name, i in self.rows.items()
            if i % every == 0
        ]

    def cell(self, place: tuple[str, str], opacity: float, unit: str) -> list[str]:
        """Return a cell, with its value where there is room."""
        x, y = self._corner(place)
        value = self.values[place]
        title = f"{place[0]}, {place[1]}: {value:.4g} {unit}"
        parts = [svg.rect(x, y, self.width, self.height, "cell", title, opacity)]
        if self.width >= 34 and self.height > 12:
            middle = x + self.width / 2
            parts.append(svg.text(middle, y + self.height * 0.7, f"{value:.3g}", "tiny", "middle"))
        return parts

    def frame(self, place: tuple[str, str]) -> str:
        """Return a frame around a cell."""
        x, y = self._corner(place)
        return svg.rect(x, y, self.width, self.height, "frame")


def time_series(lines: Sequence[Series], measure: str, *, standalone: bool = False) -> str:
    """Return a measure over runs: a line and a ribbon for each series, golden steps dashed, change
    points dotted.
    """
    lines = [
        Series(s.name, s.points[-MAX_POINTS:], s.goldens[-50:], s.changes[-20:])
        for s in lines[:MAX_SERIES]
    ]
    points = [point for s in lines for point in s.points]
    if not points:
        return ""
    ends = [value for s in lines for _, value in s.goldens]
    for point in points:
        ends += [v for v in (point.value, point.low, point.high) if v is not None]
    low, high = svg.bounds(ends)
    first, last = min(p.at for p in points), max(p.at for p in points)
    left, right, top, bottom = 80.0, svg.WIDTH - 16.0, 24.0 + 18 * len(lines), 320.0
    x = svg.scale(first, max(last, first + 1), left + 8, right - 8)
    y = svg.scale(low, high, bottom, top)
    parts = _horizontal_grid(y, low, high, left, right)
    for i, s in enumerate(lines):
        parts += _ribbon(s, i, x, y)
        parts += _golden_steps(s, x, y, first, right - 8)
        parts += _change_points(s, x, top, bottom)
        parts += _line(s, i, x, y)
        parts.append(svg.text(left, 16 + 18 * i, f"● {s.name}", f"key s{i}"))
    parts += _run_labels(points, x, bottom)
    caption = f"{measure} over runs, oldest first; {_legend(lines)}"
    parts.append(svg.text((left + right) / 2, bottom + 36, caption, "soft", "middle"))
    alt = "; ".join(_series_in_words(s) for s in lines if s.points)
    return svg.plot(parts, bottom + 46, f"{measure} over runs", alt, standalone=standalone)


def _run_labels(points: Sequence[Point], x: svg.Axis, bottom: float) -> list[str]:
    """Return the labels of runs below the axis, as many as there is room for."""
    labels = {p.at: p.label for p in points if p.label}
    every = max(1, math.ceil(len(labels) / MAX_LABELS))
    shown = [at for n, at in enumerate(sorted(labels)) if n % every == 0]
    width = (svg.WIDTH - 100) / max(1, len(shown))
    parts = []
    for n, at in enumerate(shown):
        anchor = "start" if n == 0 else "end" if x(at) > svg.WIDTH - 60 else "middle"
        parts.append(
            svg.text(x(at), bottom + 16, labels[at], "soft tiny", anchor, int(width / 6) or 1)
        )
    return parts


def _legend(lines: Sequence[Series]) -> str:
    """Return what the marks mean that are drawn."""
    verdicts = {p.verdict for s in lines for p in s.points}
    marks = {
        "ribbon: interval": any(len(_known_ends(s)) > 1 for s in lines),
        "dashed: accepted golden": any(s.goldens for s in lines),
        "dotted: change": any(s.changes for s in lines),
        "red: failed": bool(verdicts & {"failed", "error"}),
        "amber: inconclusive": "inconclusive" in verdicts,
    }
    return "; ".join(words for words, drawn in marks.items() if drawn) or "dots: runs"


def _known_ends(s: Series) -> list[tuple[int, float, float]]:
    return [(p.at, p.low, p.high) for p in s.points if p.low is not None and p.high is not None]


def _ribbon(s: Series, i: int, x: svg.Axis, y: svg.Axis) -> list[str]:
    known = [(x(at), low, high) for at, low, high in _known_ends(s)]
    if len(known) < 2:
        return []
    upper = [(at, y(high)) for at, _, high in known]
    lower = [(at, y(low)) for at, low, _ in reversed(known)]
    return [svg.path([*upper, *lower], f"ribbon s{i}", closed=True)]


def _golden_steps(s: Series, x: svg.Axis, y: svg.Axis, first: int, end: float) -> list[str]:
    parts, steps = [], sorted(s.goldens)
    for n, (at, value) in enumerate(steps):
        following = steps[n + 1] if n + 1 < len(steps) else None
        until = x(following[0]) if following else end
        parts.append(svg.line(x(max(at, first)), y(value), until, y(value), "golden"))
        if following:
            parts.append(svg.line(until, y(value), until, y(following[1]), "golden"))
    return parts


def _change_points(s: Series, x: svg.Axis, top: float, bottom: float) -> list[str]:
    parts = []
    for n, (at, why) in enumerate(s.changes):
        offset, anchor = (-4, "end") if x(at) > svg.WIDTH * 0.6 else (4, "start")
        height = top + 12 + 14 * (n % 3)
        parts += [
            svg.line(x(at), top, x(at), bottom, "change"),
            svg.text(x(at) + offset, height, why, "soft tiny", anchor, 60),
        ]
    return parts


def _line(s: Series, i: int, x: svg.Axis, y: svg.Axis) -> list[str]:
    kinds = {"failed": "failed", "error": "failed", "inconclusive": "inconclusive"}
    dots = [
        svg.dot(x(p.at), y(p.value), kinds.get(p.verdict, f"dot s{i}"), p.title, 3.2)
        for p in s.points
    ]
    return [svg.path([(x(p.at), y(p.value)) for p in s.points], f"line s{i}"), *dots]


def _series_in_words(s: Series) -> str:
    changes = "".join(f", change at run {at + 1}: {why}" for at, why in s.changes)
    return f"{s.name}: {len(s.points)} runs, last {s.points[-1].value:.6g}{changes}"


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``layer 9`` before ``layer 10``."""
    parts = re.split(r"([0-9]{1,15})", name[:200])
    return tuple(
        (0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part
    )
