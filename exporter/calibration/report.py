# SPDX-License-Identifier: Apache-2.0
"""What a calibration measured, and its report as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verifier.text import counted

LISTED = 20


@dataclass(frozen=True, slots=True)
class TextUse:
    """A text file: sequences requested and taken from it, and their tokens."""

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
        """How many experts have tokens."""
        return sum(1 for t in self.tokens if t)


@dataclass(frozen=True, slots=True)
class Fallback:
    """A statistic that was replaced: why (``condition``), by which value, and of which statistic
    that is.
    """

    name: str
    condition: str
    value: float
    taken_from: str


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration measured and wrote.

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
        """Tokens that ran through the model."""
        return sum(t.tokens for t in self.texts)


def listed(names: Iterable[str], limit: int = LISTED) -> str:
    """Return names as one text, the first ``limit`` in full."""
    every = list(names)
    more = f" and {len(every) - limit:,} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def render_text(report: CalibrationReport) -> str:
    """Return the report as text, one fact per line."""
    lines = [
        f"calibrated {counted(report.modules, 'module')} of {report.source} "
        f"(recipe {report.recipe}, method {report.method})"
    ]
    lines += [f"  texts     {_text_use(text)}" for text in report.texts]
    lines += [f"  experts   {_layer(layer)}" for layer in report.layers]
    if report.dead:
        dead = counted(len(report.dead), "expert")
        lines.append(f"  dead      {dead} without tokens: {listed(report.dead)}")
    if report.few:
        few = listed(f"{name} ({tokens:,})" for name, tokens in report.few)
        lines.append(
            f"  warning   {counted(len(report.few), 'expert')} with fewer than "
            f"{counted(report.min_tokens, 'token')}: {few}"
        )
    for condition in sorted({f.condition for f in report.fallbacks}):
        same = [f for f in report.fallbacks if f.condition == condition]
        values = listed(f"{f.name} = {f.value:.4g} from {f.taken_from}" for f in same)
        lines.append(f"  fallback  {counted(len(same), 'statistic')} ({condition}): {values}")
    low, high = report.smallest, report.largest
    lines.append(f"  amax      {low[1]:.4g} ({low[0]}) to {high[1]:.4g} ({high[0]})")
    lines.append(f"  kv        {report.kv:,} statistics of cached keys and values")
    lines.append(f"wrote {report.out}")
    return "\n".join(lines) + "\n"


def _text_use(text: TextUse) -> str:
    short = ""
    if text.samples < text.asked:
        short = f" ({text.asked:,} requested; the file holds no more)"
    return f"{text.path}: {counted(text.samples, 'sample')}{short}, {text.tokens:,} tokens"


def _layer(layer: LayerExperts) -> str:
    tokens: Sequence[int] = layer.tokens
    return (
        f"{layer.container}: {layer.seen:,} of {len(tokens):,} with tokens, "
        f"{min(tokens):,} to {max(tokens):,} each"
    )
