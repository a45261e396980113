# SPDX-License-Identifier: Apache-2.0
"""The result of a search as text and as JSON; the schema of the JSON is
``verifier/report/schemas/locate-1.0.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from verifier.locate.result import Blame, Cell, Layer, LocateResult
from verifier.locate.sound import WeightNoise
from verifier.text import printable

SCHEMA_VERSION = "1.0"
MAX_WEIGHTS = 5
"""How many weights of a module the JSON names, the noisiest first."""


def render_text(result: LocateResult) -> str:
    """Return the result for people, with a final newline."""
    return "\n".join(printable(line, 2000) for line in _lines(result)) + "\n"


def _lines(result: LocateResult) -> Iterator[str]:
    yield f"KL(base || candidate)  {result.kl:.6f} nats per token"
    yield f"reference              {result.reference:.6f}  ({result.source})"
    if result.ratio is not None:
        low, high = (math.exp(x) for x in (result.ratio.low, result.ratio.high))
        yield (
            f"ratio                  {result.ratio.ratio:.3f} [{low:.3f}, {high:.3f}], margin "
            f"{math.exp(result.margin):.4g}"
        )
    for number, blame in enumerate(result.blames, 1):
        yield ""
        yield from _blame_lines(number, blame)
    yield ""
    yield from (f"note: {note}" for note in result.notes)
    yield f"cost: {result.cost:.2f} gates"
    yield f"verdict: {result.outcome.upper()} ({summary(result)})"


def summary(result: LocateResult) -> str:
    """Return in one line what the result is."""
    if not result.blames:
        within = {"passed": "nothing to blame", "failed": "nothing differs"}
        return within.get(result.outcome, "not shown to be within the margin, nor beyond it")
    first = place(result.blames[0])
    more = f" and {len(result.blames) - 1} more" if len(result.blames) > 1 else ""
    if math.isnan(result.explained):
        return f"{first}{more}: hidden states are not finite"
    return f"{first}{more}: {result.explained:.0%} of the excess explained"


def place(blame: Blame) -> str:
    """Return where a blame is: ``layer 2 experts``."""
    if blame.layer.name == blame.cell.name:
        return blame.layer.name
    return f"{blame.layer.name} {blame.cell.name}"


def _blame_lines(number: int, blame: Blame) -> Iterator[str]:
    explains = "" if math.isnan(blame.share) else f"  {blame.cost:.6f} nats, {blame.share:.0%}"
    yield f"{number}. {place(blame)}{explains}"
    for label, words in evidence(blame):
        yield f"   {label:<18} {words}"
    for command in blame.commands:
        yield f"   {command}"


def evidence(blame: Blame) -> Iterator[tuple[str, str]]:
    """Yield what is known of a blamed module, by its name."""
    worst = blame.cell.worst
    if worst is not None:
        yield (
            "weights",
            f"{decibels(worst.sqnr)} ({worst.format}; plain rounding {decibels(worst.expected)}"
            + (f", other layers {decibels(blame.peers)}" if blame.peers is not None else "")
            + f") in {worst.module}",
        )
    if blame.cell.activation is not None:
        yield "rounded inputs", decibels(blame.cell.activation)
    if blame.layer.agreement is not None:
        yield "router agreement", f"{blame.layer.agreement:.1%} of tokens have the base's experts"


def decibels(value: float) -> str:
    """Return an SQNR in words."""
    if math.isinf(value):
        return "equal" if value > 0 else "not finite"
    return f"{value:.1f} dB"


def render_json(result: LocateResult) -> str:
    """Return the result as one JSON object, with a final newline."""
    return json.dumps(value_of(result), indent=2, allow_nan=False) + "\n"


def value_of(result: LocateResult) -> dict[str, Any]:
    """Return the result as JSON values; numbers that are not finite are null."""
    interval = result.ratio
    bounds = (interval.ratio, math.exp(interval.low), math.exp(interval.high)) if interval else ()
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": result.outcome,
        "candidate": result.candidate,
        "base": result.base,
        "key": dict(result.key),
        "kl": _finite(result.kl),
        "reference": {"kl": _finite(result.reference), "source": result.source},
        "ratio": [_finite(x) for x in bounds] or None,
        "max_ratio": math.exp(result.margin),
        "explained": _finite(result.explained),
        "cost_in_gates": result.cost,
        "blamed": [_blame(blame) for blame in result.blames],
        "layers": [_layer(layer) for layer in result.layers],
        "modules": [_cell(cell) for cell in result.cells],
        "notes": list(result.notes),
        "environment": dict(result.environment),
    }


def _blame(blame: Blame) -> dict[str, Any]:
    return {
        "layer": blame.layer.name,
        "module": blame.cell.name,
        "kl": _finite(blame.cost),
        "share_of_excess": _finite(blame.share),
        "peers_sqnr": _finite(blame.peers),
        "router_agreement": blame.layer.agreement,
        "show": list(blame.commands),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "kl": _finite(layer.cost),
        "router_agreement": layer.agreement,
    }


def _cell(cell: Cell) -> dict[str, Any]:
    noisiest = sorted(cell.noise, key=lambda noise: -noise.loss)[:MAX_WEIGHTS]
    return {
        "stage": cell.place.stage,
        "path": cell.place.module,
        "module": cell.name,
        "kl": _finite(cell.cost),
        "sqnr": _finite(cell.sqnr),
        "inputs_sqnr": _finite(cell.activation),
        "weights": [_noise(noise) for noise in noisiest],
    }


def _noise(noise: WeightNoise) -> dict[str, Any]:
    return {
        "tensor": noise.tensor,
        "format": noise.format,
        "sqnr": _finite(noise.sqnr),
        "plain_rounding_sqnr": _finite(noise.expected),
        "row": noise.row,
        "block": noise.block,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
