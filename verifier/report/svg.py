# SPDX-License-Identifier: Apache-2.0
"""The SVG elements of the pictures: escaped text, shapes by CSS class, linear axes.

Colours are the page's CSS variables, so that one picture is light and dark; a standalone file has
its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from verifier.text import printable

WIDTH = 960
STYLE = """\
svg.plot { font: 12px system-ui, sans-serif; max-width: 100%; height: auto }
.plot text { fill: var(--ink) }
.plot .soft { fill: var(--soft) }
.plot .grid { stroke: var(--line) }
.plot .axis { stroke: var(--soft) }
.plot .passed { fill: var(--passed); stroke: var(--passed) }
.plot .failed { fill: var(--error); stroke: var(--error) }
.plot .inconclusive { fill: var(--warning); stroke: var(--warning) }
.plot .worst { fill: var(--warning); stroke: var(--warning) }
.plot .info { fill: var(--info); stroke: var(--info) }
.plot .golden { fill: none; stroke: var(--warning); stroke-dasharray: 5 3 }
.plot .margin { stroke: var(--ink); stroke-width: 2 }
.plot .change { stroke: var(--soft); stroke-dasharray: 2 3 }
.plot .ribbon { fill: var(--c); fill-opacity: .16; stroke: none }
.plot .line { fill: none; stroke: var(--c); stroke-width: 1.6 }
.plot .dot, .plot .key { fill: var(--c) }
.plot .s0 { --c: var(--info) }
.plot .s1 { --c: var(--passed) }
.plot .s2 { --c: var(--warning) }
.plot .s3 { --c: var(--error) }
.plot .s4 { --c: var(--soft) }
.plot .s5 { --c: var(--ink) }
.plot rect.passed[fill-opacity], .plot rect.failed[fill-opacity] { stroke: var(--line) }
.plot text.on { fill: var(--ground) }
.plot .cell { fill: var(--info); stroke: var(--ground); stroke-width: 1 }
"""
COLORS = """\
:root, svg { color-scheme: light dark;
  --ground: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --panel: #f6f8fa;
  --error: #b3261e; --warning: #8a5a00; --info: #0b5cad; --passed: #1a6e34 }
@media (prefers-color-scheme: dark) { :root, svg {
  --ground: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #353c44; --panel: #1d2125;
  --error: #ff8a80; --warning: #f0b849; --info: #7ab8ff; --passed: #6fd08c } }
"""
LARGEST = 1e100
Axis = Callable[[float], float]


def text(
    x: float, y: float, words: str, kind: str = "", anchor: str = "start", limit: int = 120
) -> str:
    """Return a line of text at its baseline; control characters are escaped, the length is
    bounded.
    """
    place = f'x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"'
    return f"<text {place}>{_escaped(words, limit)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def rect(
    x: float, y: float, w: float, h: float, kind: str, title: str = "", opacity: float | None = None
) -> str:
    """Return a rectangle, with a title that a browser shows under the pointer."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"'
    faint = f' fill-opacity="{opacity:.2f}"' if opacity is not None else ""
    return _titled("rect", f'{place} class="{kind}"{faint}', title)


def dot(x: float, y: float, kind: str, title: str = "", size: float = 4) -> str:
    """Return a dot, with a title that a browser shows under the pointer."""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"'
    return _titled("circle", f'{place} class="{kind}"', title)


def _titled(tag: str, attributes: str, title: str) -> str:
    if not title:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}><title>{_escaped(title, 300)}</title></{tag}>"


def path(points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> str:
    """Return a line through points, or an area."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{steps}{"Z" if closed else ""}" class="{kind}"/>' if points else ""


def plot(
    parts: Sequence[str], height: float, title: str, alt: str, *, standalone: bool = False
) -> str:
    """Return an ``<svg>`` with a title and a description, which screen readers read."""
    box = f'width="{WIDTH}" height="{height:.0f}"'
    namespace, ground = "", ""
    if standalone:
        namespace = ' xmlns="http://www.w3.org/2000/svg"'
        ground = f'<style>{COLORS}{STYLE}</style><rect {box} style="fill:var(--ground)"/>'
    words = _escaped(alt, 1500)
    return (
        f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height:.0f}" {box}{namespace} '
        f'aria-label="{words}"><title>{_escaped(title, 200)}</title><desc>{words}</desc>{ground}'
        f"{''.join(parts)}</svg>"
    )


def _escaped(words: str, limit: int) -> str:
    return escape(printable(words, limit))


def scale(low: float, high: float, start: float, end: float) -> Axis:
    """Return a linear map of [low, high] to [start, end]; values outside go to the ends."""
    span = high - low or 1.0
    return lambda value: start + (end - start) * min(max((value - low) / span, 0.0), 1.0)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers between two values."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span / count))
    steps = [factor * power for factor in (1, 2, 5)]
    step = next((step for step in steps if span / step <= count), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)][:50]


def number(value: float) -> str:
    """Return a short number for an axis."""
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.2e}"


def bounds(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """Return the least and greatest value below `LARGEST` with some room, (0, 1) where there is
    none.
    """
    finite = [value for value in values if abs(value) < LARGEST]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = (high - low) * pad or abs(high) * pad or 1e-6
    return low - room, high + room
