# SPDX-License-Identifier: Apache-2.0
"""QC515: decoded values are further from the base than the format need be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Tensor
from verifier.closeness import PIECE, Distance, Piece, distance, floats, norm2, peak_of
from verifier.decoding import nearest
from verifier.errors import ContentError
from verifier.findings import Finding
from verifier.rules.context import Context, Judged
from verifier.rules.facts import Spots
from verifier.rules.registry import rule
from verifier.schemes import Format, Module

HELD = 64 << 20
WEAK = 1.25
LOST = 0.5


@rule(
    "QC515", "weak reconstruction", severity="warning", depth="payload", unit="quantized weights", needs=("base",),
    split=True, consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"), sources=("NVIDIA/Model-Optimizer#2243",),
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """Decoded, each quantized weight is as near to the base as its format can be on that very tensor.

    Relative error is ||decoded - base|| / ||base||. It is compared with the best codes under the stored scales and with
    plain ``max`` calibration, whichever is worse; no fixed band exists (0 for +-c weights, 0.36 on blocks at the floor).
    **Why.** Scales rounded after the codes were chosen; a swapped, foreign or permuted tensor.
    **Hurts.** Quality; with a foreign tensor, everything.
    **Mend.** Encode the tensor again from the base. Beyond 1.25 times what is possible it is a warning; where more than
    half of the tensor is lost and the format is not to blame, an error.
    """
    base = ctx.base
    if base is None or ctx.unrelated_base:
        ctx.tally.miss(len(ctx.quantized_modules), "the base is another model")
        return
    for module in ctx.quantized_modules:
        weight, source = module.weight, base.modules.get(module.name)
        found = ctx.format_of(module)
        if weight is None or source is None or found is None:
            ctx.tally.miss(1, "the base has no such weight, or the format is not known")
            continue
        pieces = _Pieces(ctx, module, base, source)
        try:
            found_distance = pieces.distance(found) if pieces.fit else None
        except ContentError:
            found_distance = None  # its parts do not fit one another: the shape rules name that
        if found_distance is None:
            ctx.tally.miss(1, "the values cannot be decoded")
            continue
        ctx.tally.see()
        yield from _judge(ctx, weight, found, pieces, *found_distance)


class _Pieces:
    """A weight and its base, some rows at a time; a remote base of moderate size is fetched once."""

    def __init__(self, ctx: Context, module: Module, base: Judged, source: Module) -> None:
        self.ctx, self.module, self.base, self.source = ctx, module, base, source
        self.fit = source.dims == module.dims and module.dims is not None
        # The base is walked twice. What the system's cache holds is cheaper to read again than fresh memory is.
        self.held: list[npt.NDArray[Any]] = []
        self.holds = base.checkpoint.source.remote and source.weight is not None and source.weight.nbytes <= HELD

    def __iter__(self) -> Iterator[Piece]:
        for start, stop, wanted in self._base():
            yield Piece(self.ctx.stored_rows(self.module, start, stop), wanted)

    def _base(self) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        out, in_ = self.module.dims or (0, 0)
        count = max(1, PIECE // max(1, in_))
        count = max(128, count // 128 * 128)  # FP8's tiles have 128 rows
        for i, start in enumerate(range(0, out, count)):
            stop = min(out, start + count)
            if i < len(self.held):
                yield start, stop, self.held[i]
                continue
            rows = self.base.rows(self.source, start, stop)
            if rows is None:
                raise ContentError(f"{self.source.name}: its values cannot be decoded")
            if self.holds:
                self.held.append(rows)
            yield start, stop, rows

    def distance(self, found: Format) -> tuple[Distance, bool]:
        """Return how far the decoded weight is from the base, and whether ``max`` calibration is defined on it."""
        return distance(self, found.name, max((peak_of(w) for _, _, w in self._base()), default=0.0))

    def possible(self, found: Format) -> float:
        """Return the squared distance of the best codes under the stored scales."""
        total = 0.0
        for piece in self:
            wanted = floats(piece.wanted)
            total += norm2(nearest(wanted, piece.parts, found.name) - wanted)
        return total


def _judge(
    ctx: Context, weight: Tensor, found: Format, pieces: _Pieces, measured: Distance, defined: bool
) -> Iterator[Finding]:
    size, error = math.sqrt(measured.size), math.sqrt(measured.error)
    if not math.isfinite(size) or not math.isfinite(error):
        if not found.packed:
            yield from _nan_codes(ctx, weight)
        return  # QC502 and QC508 name the others
    if size == 0:
        if error > 0:
            yield ctx.finding("the base is all zero and the decoded weight is not", tensor=weight.name, severity="error")
        return
    relative = error / size
    if relative < 1e-3:
        return
    by_max = math.sqrt(measured.plain) / size if defined else None
    if by_max is not None and relative <= WEAK * by_max:
        return
    possible = math.sqrt(pieces.possible(found)) / size
    by_max = possible if by_max is None else by_max
    best = max(min(possible, 4 * by_max), by_max)
    if relative > max(LOST, 2 * by_max):
        yield ctx.finding(
            "the decoded weight is not the base's", tensor=weight.name, severity="error",
            observed=f"relative error {relative:.3f}", expected=f"about {by_max:.3f} ({found.algo} on this tensor)",
        )  # fmt: skip
    elif relative > WEAK * best:
        yield ctx.finding(
            "further from the base than the format need be", tensor=weight.name,
            observed=f"relative error {relative:.4f}", expected=f"at most {best:.4f} ({found.algo} on this tensor)",
        )  # fmt: skip


def _nan_codes(ctx: Context, weight: Tensor) -> Iterator[Finding]:
    spots = Spots()
    for start, codes in ctx.pieces(weight):
        spots.add(start, np.flatnonzero((codes & 0x7F) == 0x7F), codes)
    if spots.count:
        yield ctx.finding(
            "NaN codes", where=ctx.at_byte(weight, spots.first), severity="error", count=spots.count,
            observed=f"0x{spots.value:02X}", expected="0x00..0x7E or 0x80..0xFE",
        )  # fmt: skip
