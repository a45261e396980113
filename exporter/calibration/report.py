# SPDX-License-Identifier: Apache-2.0
"""What a calibration saw, and the text that says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN = 20


@dataclass(frozen=True, slots=True)
class TextUse:
    """A text file: sequences asked for and taken from it, and their tokens."""

    path: str
    sha256: str
    asked: int
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The calibrated experts of one layer: hub name of their container, their numbers, the tokens
    of each.
    """

    container: str
    experts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def seen(self) -> int:
        """How many saw a token."""
        return sum(1 for t in self.tokens if t)


@dataclass(frozen=True, slots=True)
class Fallback:
    """A statistic that was replaced: ``condition`` says why, ``value`` by what, ``taken_from``
    whose that is.
    """

    name: str
    condition: str
    value: float
    taken_from: str


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration saw and wrote.

    ``modules`` counts input maxima, ``kv`` maxima of cached keys and values; ``dead`` and ``few``
    name experts (``<container>.<number>``) without tokens, and with fewer than the minimum;
    ``smallest`` and ``largest`` are (module, input maximum), fallbacks included.
    """

    source: str
    out: str
    recipe: str
    method: str
    modules: int
    kv: int
    texts: tuple[TextUse, ...]
    layers: tuple[LayerExperts, ...]
    dead: tuple[str, ...]
    few: tuple[tuple[str, int], ...]
    min_tokens: int
    fallbacks: tuple[Fallback, ...]
    smallest: tuple[str, float]
    largest: tuple[str, float]

    @property
    def tokens(self) -> int:
        """Tokens that the model was given."""
        return sum(t.tokens for t in self.texts)


def named(names: Iterable[str], shown: int = SHOWN) -> str:
    """Return some names as one text, the first ``shown`` in full."""
    found = list(names)
    more = f" and {len(found) - shown:,} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more


def render_text(report: CalibrationReport) -> str:
    """Return the report as text, one fact a line."""
    lines = [
        f"calibrated {report.modules:,} modules of {report.source} by {report.recipe}, {report.method}"
    ]
    for text in report.texts:
        short = (
            f" ({text.asked:,} asked for: the texts hold no more)"
            if text.samples < text.asked
            else ""
        )
        lines.append(
            f"  texts     {text.path}: {text.samples:,} samples{short}, {text.tokens:,} tokens"
        )
    lines += [
        f"  experts   {layer.container}: {layer.seen:,} of {len(layer.tokens):,} with tokens, {_spread(layer.tokens)}"
        for layer in report.layers
    ]
    if report.dead:
        lines.append(
            f"  dead      {len(report.dead):,} experts without tokens: {named(report.dead)}"
        )
    if report.few:
        few = named(f"{name} ({tokens:,})" for name, tokens in report.few)
        lines.append(
            f"  warning   {len(report.few):,} experts with fewer than {report.min_tokens:,} tokens: {few}"
        )
    conditions = sorted({f.condition for f in report.fallbacks})
    for condition in conditions:
        hit = [f for f in report.fallbacks if f.condition == condition]
        values = named(f"{f.name} = {f.value:.4g} of {f.taken_from}" for f in hit)
        lines.append(f"  fallback  {len(hit):,} statistics ({condition}): {values}")
    low, high = report.smallest, report.largest
    lines.append(f"  amax      {low[1]:.4g} ({low[0]}) to {high[1]:.4g} ({high[0]})")
    lines.append(f"  kv        {report.kv:,} maxima of cached keys and values")
    lines.append(f"wrote {report.out}")
    return "\n".join(lines) + "\n"


def _spread(tokens: Sequence[int]) -> str:
    return f"{min(tokens):,} to {max(tokens):,} each"
