# SPDX-License-Identifier: Apache-2.0
"""QC515: decoded values are further from the base than the format need be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.checkpoint import Tensor
from verifier.decoding import Float32, max_scales, nearest
from verifier.findings import Finding
from verifier.rules.context import Context, stored
from verifier.rules.registry import rule
from verifier.schemes import Format, Module

WEAK = 1.25
LOST = 0.5


@rule(
    "QC515", "weak reconstruction", severity="warning", depth="payload", unit="quantized weights", needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"), sources=("NVIDIA/Model-Optimizer#2243",),
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
        wanted, got = base.values(source), ctx.values(module)
        if wanted is None or got is None or wanted.shape != got.shape:
            ctx.tally.miss(1, "the values cannot be decoded")
            continue
        ctx.tally.see()
        yield from _judge(ctx, module, weight, found, wanted, got)


def _judge(
    ctx: Context, module: Module, weight: Tensor, found: Format, wanted: Float32, got: Float32
) -> Iterator[Finding]:
    size = _norm(wanted)
    if not found.packed:
        flat = ctx.bytes_of(weight)
        bad = np.flatnonzero((flat & 0x7F) == 0x7F)
        if bad.size:
            yield ctx.finding(
                "NaN codes", where=ctx.at_byte(weight, int(bad[0])), severity="error", count=int(bad.size),
                observed=f"0x{int(flat[bad[0]]):02X}", expected="0x00..0x7E or 0x80..0xFE",
            )  # fmt: skip
            return
    if not np.isfinite(size) or not np.isfinite(got).all():
        return  # QC502 and QC508 name those
    error = _norm(got - wanted)
    if size == 0:
        if error > 0:
            yield ctx.finding("the base is all zero and the decoded weight is not", tensor=weight.name, severity="error")
        return
    relative = error / size
    if relative < 1e-3:
        return
    possible = _norm(nearest(wanted, stored(module.parts, ctx.checkpoint), found.name) - wanted) / size
    plain = max_scales(wanted, found.name)
    by_max = _norm(nearest(wanted, plain, found.name) - wanted) / size if plain is not None else possible
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


def _norm(values: Float32) -> float:
    # Not a dot product: that would start BLAS threads beside the others.
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))
