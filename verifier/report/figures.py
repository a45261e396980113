# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run: forest plot, documents, survival curves, heat maps, time series. All
bounded, all with alt text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verifier.report import svg

MAX_ROWS = 60
MAX_BARS = 400
MAX_CELLS = 5_000
MAX_SERIES = 6
MAX_POINTS = 500
WORST = 10


@dataclass(frozen=True)
class Row:
    """One line of a forest plot: a difference with its interval, the margin that it is held
    against, the verdict.
    """

    label: str
    value: float
    low: float
    high: float
    margin: float | None
    verdict: str


@dataclass(frozen=True)
class Point:
    """One run of a time series; ``low`` and ``high`` are its interval where it has one."""

    at: int
    value: float
    low: float | None
    high: float | None
    verdict: str
    title: str


@dataclass
class Series:
    """Runs of one name and protocol, and what happened to them: (position, value) of accepted
    goldens, change points.
    """

    name: str
    points: list[Point]
    goldens: list[tuple[int, float]] = field(default_factory=list)
    changes: list[tuple[int, str]] = field(default_factory=list)


def forest(rows: Sequence[Row], unit: str) -> str:
    """Return intervals under each other with their margins; green passed, red failed, amber
    inconclusive.
    """
    shown = list(rows[:MAX_ROWS])
    ends = [v for r in shown for v in (r.low, r.high, r.value, r.margin or 0.0, 0.0)]
    low, high = svg.bounds(ends)
    left, right, top = 250.0, svg.WIDTH - 250.0, 20.0
    x = svg.scale(low, high, left, right)
    bottom = top + 36 * len(shown)
    parts = []
    for t in svg.ticks(low, high):
        parts += [
            svg.line(x(t), top, x(t), bottom, "grid"),
            svg.text(x(t), bottom + 16, svg.number(t), "soft", "middle"),
        ]
    parts.append(svg.line(x(0), top, x(0), bottom, "axis"))
    for i, r in enumerate(shown):
        y = top + 36 * i + 20
        parts += [
            svg.text(left - 12, y + 4, r.label, "", "end", 38),
            svg.line(x(r.low), y, x(r.high), y, f"{r.verdict} line-w"),
            svg.line(x(r.low), y - 5, x(r.low), y + 5, r.verdict),
            svg.line(x(r.high), y - 5, x(r.high), y + 5, r.verdict),
            svg.dot(x(r.value), y, r.verdict, f"{r.value:+.6f} [{r.low:+.6f}, {r.high:+.6f}]"),
        ]
        if r.margin is not None:
            near = x(r.margin) > right - 100  # what is said of the row stands there
            said = svg.text(
                x(r.margin) + (-5 if near else 5),
                y - 10,
                f"margin {r.margin:.4g}",
                "soft",
                "end" if near else "start",
            )
            parts += [svg.line(x(r.margin), y - 13, x(r.margin), y + 13, "margin"), said]
        ends_ = f"[{r.low:+.4f}, {r.high:+.4f}]"
        parts.append(
            svg.text(
                svg.WIDTH - 4,
                y + 4,
                f"{r.value:+.5f} {ends_} {r.verdict}",
                r.verdict + " said",
                "end",
            )
        )
    parts.append(svg.text((left + right) / 2, bottom + 34, unit, "soft", "middle"))
    alt = "; ".join(
        f"{r.label}: {r.value:+.5f}, interval {r.low:+.5f} to {r.high:+.5f}, {_margin(r)}{r.verdict}"
        for r in shown
    )
    return svg.plot(parts, bottom + 42, "Differences with intervals and margins", alt)


def _margin(row: Row) -> str:
    return f"margin {row.margin:.5f}, " if row.margin is not None else ""


def documents(deltas: Sequence[tuple[str, float]], mean: float) -> str:
    """Return the difference of each document, smallest first; the worst ten are numbered.

    Args:
        deltas: (name of the document, its mean difference in nats a token).
        mean: the difference over all tokens.
    """
    ordered = sorted((d for d in deltas if math.isfinite(d[1])), key=lambda d: d[1])
    worst = {n for n, _ in ordered[-WORST:]}
    step = max(1, math.ceil(len(ordered) / MAX_BARS))
    # Of many documents every step-th is drawn and the worst ten always.
    shown = [d for i, d in enumerate(ordered) if i % step == 0 or d[0] in worst]
    low, high = svg.bounds([*(v for _, v in shown), 0.0])
    left, right, top, bottom = 70.0, svg.WIDTH - 10.0, 24.0, 250.0
    y = svg.scale(low, high, bottom, top)
    wide = (right - left) / max(1, len(shown))
    parts = []
    for t in svg.ticks(low, high):
        parts += [
            svg.line(left, y(t), right, y(t), "grid"),
            svg.text(left - 6, y(t) + 4, svg.number(t), "soft", "end"),
        ]
    for i, (name, value) in enumerate(shown):
        x, bad = left + i * wide, name in worst
        kind = "failed" if bad else "info"
        parts.append(
            svg.rect(
                x + wide * 0.1,
                min(y(0), y(value)),
                wide * 0.8,
                abs(y(value) - y(0)),
                kind,
                f"{name}: {value:+.5f}",
            )
        )
        if bad and wide >= 9:
            up, over = x + wide / 2 + 3.5, y(max(value, 0)) - 4
            number = svg.text(0, 0, name.rpartition(" ")[2], "tiny", limit=8)
            parts.append(f'<g transform="translate({up:.1f} {over:.1f}) rotate(-90)">{number}</g>')
    parts += [
        svg.line(left, y(0), right, y(0), "axis"),
        svg.line(left, y(mean), right, y(mean), "golden"),
    ]
    parts.append(svg.text(left + 4, y(mean) - 4, f"mean {mean:+.5f}", "soft"))
    parts.append(
        svg.text(
            (left + right) / 2,
            bottom + 22,
            f"{len(ordered):,} documents, smallest first; nats a token",
            "soft",
            "middle",
        )
    )
    told = ", ".join(f"{n} {v:+.5f}" for n, v in reversed(ordered[-WORST:]))
    return svg.plot(
        parts,
        bottom + 32,
        "Difference of each document",
        f"The mean is {mean:+.5f}. The worst documents: {told}",
    )


def survival(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return the share of tokens whose KL divergence is above a value, both axes logarithmic.

    Args:
        curves: name of the curve -> (nats, share of tokens above), above zero both.
    """
    kept = {
        n: [(a, b) for a, b in c if a > 0 and b > 0][:2000]
        for n, c in list(curves.items())[:MAX_SERIES]
    }
    logs = [(math.log10(a), math.log10(b)) for c in kept.values() for a, b in c]
    if not logs:
        return ""
    (x0, x1), (y0, y1) = (
        svg.bounds([a for a, _ in logs], 0.02),
        svg.bounds([b for _, b in logs], 0.02),
    )
    left, right, top, bottom = 70.0, svg.WIDTH - 180.0, 16.0, 280.0
    x, y = svg.scale(x0, x1, left, right), svg.scale(y0, y1, bottom, top)
    parts = []
    for e in range(math.ceil(x0), math.floor(x1) + 1):
        parts += [
            svg.line(x(e), top, x(e), bottom, "grid"),
            svg.text(x(e), bottom + 16, f"{10.0**e:g}", "soft", "middle"),
        ]
    for e in range(math.ceil(y0), math.floor(y1) + 1):
        parts += [
            svg.line(left, y(e), right, y(e), "grid"),
            svg.text(left - 6, y(e) + 4, f"{10.0**e:g}", "soft", "end"),
        ]
    for i, (name, curve) in enumerate(kept.items()):
        points = [(x(math.log10(a)), y(math.log10(b))) for a, b in curve]
        parts += [
            svg.path(points, f"line s{i}"),
            svg.text(right + 12, top + 14 + 20 * i, f"— {name}", f"key s{i}", limit=24),
        ]
    parts.append(
        svg.text(
            (left + right) / 2,
            bottom + 34,
            "KL divergence of a token, nats; share of tokens above it",
            "soft",
            "middle",
        )
    )
    told = "; ".join(f"{n}: largest {max(a for a, _ in c):.3g} nats" for n, c in kept.items() if c)
    return svg.plot(parts, bottom + 42, "Survival of the KL divergence", told)


def heat(
    cells: Mapping[tuple[str, str], float], title: str, unit: str, *, low_is_bad: bool = True
) -> str:
    """Return a heat map, rows by columns; strong is high, and the worst cell is framed in red.

    Args:
        cells: (row, column) -> value; a map of more than 5,000 cells keeps its worst rows.
        title: what is shown.
        unit: of the values.
        low_is_bad: which end is the worst.
    """
    found = {k: v for k, v in cells.items() if math.isfinite(v)}
    columns = sorted({c for _, c in found}, key=_natural)[:512]
    rows = sorted({r for r, _ in found}, key=_natural)
    sign = 1 if low_is_bad else -1
    room = max(1, MAX_CELLS // max(1, len(columns)))
    dropped = len(rows) - room
    if dropped > 0:
        worst_of: dict[str, float] = {}
        for (r, _), v in found.items():
            worst_of[r] = min(sign * v, worst_of.get(r, math.inf))
        kept = set(sorted(rows, key=lambda r: worst_of[r])[:room])
        rows = [r for r in rows if r in kept]
    shown = {(r, c): found[r, c] for r in rows for c in columns if (r, c) in found}
    if not shown:
        return ""
    worst = min(shown, key=lambda k: sign * shown[k])
    least, most = min(shown.values()), max(shown.values())
    left, top = 190.0, 56.0
    wide, tall = (
        min(92.0, (svg.WIDTH - left - 10) / len(columns)),
        (22.0 if len(rows) <= 64 else 9.0),
    )
    parts = []
    for j, c in enumerate(columns):
        if wide >= 40 or j % max(1, math.ceil(30 / wide)) == 0:
            parts.append(
                svg.text(
                    left + (j + 0.5) * wide,
                    top - 8,
                    c,
                    "soft tiny",
                    "middle",
                    max(3, int(wide / 6)),
                )
            )
    for i, r in enumerate(rows):
        y = top + i * tall
        if tall > 12 or i % 2 == 0:
            parts.append(svg.text(left - 8, y + tall * 0.7, r, "soft tiny", "end", 30))
        for j, c in enumerate(columns):
            if (r, c) not in shown:
                continue
            v = shown[r, c]
            faint = 0.12 + 0.5 * (v - least) / ((most - least) or 1.0)
            parts.append(
                svg.rect(left + j * wide, y, wide, tall, "cell", f"{r}, {c}: {v:.4g} {unit}", faint)
            )
            if wide >= 34 and tall > 12:
                parts.append(
                    svg.text(left + (j + 0.5) * wide, y + tall * 0.7, f"{v:.3g}", "tiny", "middle")
                )
    if least == most:
        told = f"{unit}; all {least:.4g}"
        parts.append(svg.text(left, 20, told, "soft"))
        return svg.plot(
            parts,
            top + len(rows) * tall + 8,
            title,
            f"{title}, {len(rows)} rows by {len(columns)} columns: {told}",
        )
    i, j = rows.index(worst[0]), columns.index(worst[1])
    parts.append(
        f'<rect x="{left + j * wide:.1f}" y="{top + i * tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" class="frame"/>'
    )
    more = f"; {dropped} further rows are not shown" if dropped > 0 else ""
    parts.append(
        svg.text(
            left,
            20,
            f"{unit}; from {least:.4g} to {most:.4g}; framed: {worst[0]}, {worst[1]}{more}",
            "soft",
        )
    )
    span = f"{unit}, from {least:.4g} to {most:.4g}"
    alt = f"{title}, {len(rows)} rows by {len(columns)} columns, {span}; the worst is {worst[0]}, {worst[1]}"
    return svg.plot(parts, top + len(rows) * tall + 8, title, alt + more)


def series(found: Sequence[Series], measure: str, *, standalone: bool = False) -> str:
    """Return a measure over runs: a line and a ribbon for each series, golden steps dashed, change
    points dotted.
    """
    shown = [
        Series(s.name, s.points[-MAX_POINTS:], s.goldens[-50:], s.changes[-20:])
        for s in found[:MAX_SERIES]
    ]
    points = [p for s in shown for p in s.points]
    if not points:
        return ""
    ends = [v for p in points for v in (p.value, p.low, p.high) if v is not None] + [
        v for s in shown for _, v in s.goldens
    ]
    low, high = svg.bounds(ends)
    first, last = min(p.at for p in points), max(p.at for p in points)
    left, right, top, bottom = 80.0, svg.WIDTH - 16.0, 24.0 + 18 * len(shown), 320.0
    x, y = (
        svg.scale(first, max(last, first + 1), left + 8, right - 8),
        svg.scale(low, high, bottom, top),
    )
    parts = []
    for t in svg.ticks(low, high):
        parts += [
            svg.line(left, y(t), right, y(t), "grid"),
            svg.text(left - 6, y(t) + 4, svg.number(t), "soft", "end"),
        ]
    for i, s in enumerate(shown):
        parts += _one(s, i, x, y, top, bottom, right - 8, first)
        parts.append(svg.text(left, 16 + 18 * i, f"● {s.name}", f"key s{i}"))
    parts.append(
        svg.text(
            (left + right) / 2,
            bottom + 20,
            f"{measure} over runs; ribbon: interval; dashed: accepted golden",
            "soft",
            "middle",
        )
    )
    told = "; ".join(
        f"{s.name}: {len(s.points)} runs, last {s.points[-1].value:.6g}"
        + "".join(f", change at run {at + 1}: {why}" for at, why in s.changes)
        for s in shown
        if s.points
    )
    return svg.plot(parts, bottom + 30, f"{measure} over runs", told, standalone=standalone)


def _one(
    s: Series, i: int, x: svg.Axis, y: svg.Axis, top: float, bottom: float, end: float, first: int
) -> list[str]:
    ribbon = [(p, p.low, p.high) for p in s.points if p.low is not None and p.high is not None]
    area = [(x(p.at), y(h)) for p, _, h in ribbon] + [
        (x(p.at), y(lo)) for p, lo, _ in reversed(ribbon)
    ]
    parts = [svg.path(area, f"ribbon s{i}", closed=True) if len(ribbon) > 1 else ""]
    steps = sorted(s.goldens)
    for n, (at, value) in enumerate(steps):
        until = x(steps[n + 1][0]) if n + 1 < len(steps) else end
        parts.append(svg.line(x(max(at, first)), y(value), until, y(value), "golden"))
        if n + 1 < len(steps):
            parts.append(svg.line(until, y(value), until, y(steps[n + 1][1]), "golden"))
    for n, (at, why) in enumerate(s.changes):
        near = x(at) > (svg.WIDTH * 0.6)
        parts += [
            svg.line(x(at), top, x(at), bottom, "change"),
            svg.text(
                x(at) + (-4 if near else 4),
                top + 12 + 14 * (n % 3),
                why,
                "soft tiny",
                "end" if near else "start",
                60,
            ),
        ]
    parts.append(svg.path([(x(p.at), y(p.value)) for p in s.points], f"line s{i}"))
    for p in s.points:
        kind = (
            "failed"
            if p.verdict in ("failed", "error")
            else "inconclusive"
            if p.verdict == "inconclusive"
            else f"dot s{i}"
        )
        parts.append(svg.dot(x(p.at), y(p.value), kind, p.title, 3.2))
    return parts


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``layer 9`` before ``layer 10``."""
    parts = re.split(r"([0-9]{1,15})", name[:200])
    return tuple((0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts) if p)
