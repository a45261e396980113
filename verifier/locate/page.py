# SPDX-License-Identifier: Apache-2.0
"""The result of a search as one HTML page: layers by modules, coloured by what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from verifier.locate.render import evidence, place, summary
from verifier.locate.result import Cell, LocateResult
from verifier.report import svg
from verifier.report.figures import Figure
from verifier.text import counted

STEPS = (0.05, 0.15, 0.5, 1.0)
"""Where colours change, in shares of the format's norm."""
OPACITIES = (0.06, 0.3, 0.5, 0.75, 1.0)
LEFT, RIGHT, ROW, MAX_LAYERS, MAX_MODULES = 90.0, 80.0, 22.0, 400, 40
TOP, LONGEST = 170.0, 32
"""Room for the names of modules, and how much of one is shown."""
NARROW, NARROWEST = 44.0, 32.0
"""Widths of a cell below which its number is small, and left to the title."""
STRONG = 0.75
"""The opacity from which words on a cell have the colour of the page."""
READ = (
    "Each cell is a module of a layer; its colour is by how much the divergence from the base "
    "falls when that module alone is put back to plain rounding, as a share of what the whole "
    "format costs (the norm): pale cells cost nothing beyond it, a full red cell costs as much "
    "again as the whole format. Empty cells have no such module; dots were not measured."
)


def render_page(result: LocateResult) -> str:
    """Return the page.

    Raises:
        ImportError: jinja2 is not installed.
    """
    from verifier.report.page import render_page as page  # noqa: PLC0415  (jinja2, an extra)

    return page((), [*_verdict(result), _map(result)])


def _verdict(result: LocateResult) -> Iterator[Figure]:
    ratio = ""
    if result.ratio is not None:
        low, high = math.exp(result.ratio.low), math.exp(result.ratio.high)
        ratio = f", {result.ratio.ratio:.3f} times (99% bounds {low:.3f} and {high:.3f})"
    words = (
        f"{result.candidate} against {result.base}: KL {result.kl:.6f} nats per token{ratio} the "
        f"reference {result.reference:.6f} ({result.source}); margin {math.exp(result.margin):.4g} "
        f"times. The search cost {result.cost:.2f} gates. {' '.join(result.notes)}"
    )
    rows = [("blamed", "nats per token", "share of the excess", "evidence", "bytes to look at")]
    for blame in result.blames:
        facts = "; ".join(f"{label}: {words}" for label, words in evidence(blame))
        share = "" if math.isnan(blame.share) else f"{blame.share:.0%}"
        cost = "" if math.isnan(blame.cost) else f"{blame.cost:.6f}"
        first, *more = blame.commands or ("",)
        rows.append((place(blame), cost, share, facts, first))
        rows += [("", "", "", "", command) for command in more]
    table = tuple(rows) if result.blames else ()
    heading = f"locate {result.outcome.upper()}: {summary(result)}"
    yield Figure(heading, words, "", table, counted(len(result.blames), "blamed module"))


def _map(result: LocateResult) -> Figure:
    layers = [layer for layer in result.layers][:MAX_LAYERS]
    names = list(dict.fromkeys(cell.name for cell in result.cells))[:MAX_MODULES]
    cells = {(cell.place.stage, cell.name): cell for cell in result.cells}
    width = (svg.WIDTH - LEFT - RIGHT) / max(1, len(names))
    parts = [_column(name, LEFT + (i + 0.5) * width) for i, name in enumerate(names)]
    for j, layer in enumerate(layers):
        y = TOP + j * ROW
        parts.append(svg.text(LEFT - 8, y + 15, layer.name, anchor="end"))
        for i, name in enumerate(names):
            cell = cells.get((layer.stage, name))
            if cell is not None:
                parts += _square(cell, (LEFT + i * width, y, width), layer.name, result.reference)
    bottom = TOP + len(layers) * ROW
    parts += _legend(bottom + 24)
    alt = f"Heat map of {len(layers)} layers and {len(names)} modules. {summary(result)}."
    picture = svg.plot(parts, bottom + 56, "What each module costs", alt)
    return Figure("What each module costs", READ, picture)


def _column(name: str, x: float) -> str:
    turned = svg.text(x, TOP - 8, name, limit=LONGEST)
    return turned.replace("<text ", f'<text transform="rotate(-45 {x:.1f} {TOP - 8:.1f})" ', 1)


def _square(cell: Cell, box: tuple[float, float, float], layer: str, norm: float) -> Sequence[str]:
    x, y, width = box
    if cell.cost is None:
        return [
            svg.dot(x + width / 2, y + ROW / 2, "soft", f"{layer} {cell.name}: not measured", 2)
        ]
    share = cell.cost / norm if norm > 0 else 0.0
    title = f"{layer} {cell.name}: {cell.cost:+.6f} nats per token, {share:+.1%} of the norm"
    kind, opacity = shade(share)
    square = svg.rect(x + 1, y + 1, width - 2, ROW - 2, kind, title, opacity)
    if abs(share) < STEPS[0] or width < NARROWEST:
        return [square]
    ink = "label" + " tiny" * (width < NARROW) + " on" * (opacity >= STRONG)
    return [square, svg.text(x + width / 2, y + 15, f"{share:+.0%}", ink, "middle")]


def shade(share: float) -> tuple[str, float]:
    """Return class and opacity of a cell that costs a share of the norm; green where the module is
    better than plain rounding.
    """
    step = sum(abs(share) >= limit for limit in STEPS)
    return ("passed" if share < 0 else "failed"), OPACITIES[step]


def _legend(y: float) -> list[str]:
    edges = [f"{step:.0%}" for step in STEPS]
    ranges = zip(["0", *edges], [*edges, "more"], strict=True)
    labels = [f"{low} to {high}" for low, high in ranges]
    parts = []
    for number, (label, opacity) in enumerate(zip(labels, OPACITIES, strict=True)):
        x = LEFT + number * 150
        parts.append(svg.rect(x, y, 16, 16, "failed", opacity=opacity))
        parts.append(svg.text(x + 22, y + 13, f"{label} of norm"))
    return parts
