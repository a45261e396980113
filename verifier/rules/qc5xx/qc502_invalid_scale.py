# SPDX-License-Identifier: Apache-2.0
"""QC502: NaN, infinite or negative weight scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.checkpoint import Tensor
from verifier.decoding import e4m3_table
from verifier.findings import Finding
from verifier.payload.scan import FlawHits, Hits
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, SCALE_BITS, Format, Sibling, pattern_value

_BIASES = frozenset({"k_bias", "v_bias"})
_BYTES = {"F8_E4M3": "0x01..0x7E"}


@rule(
    "QC502",
    "NaN, infinite or negative weight scale",
    severity="error",
    depth="payload",
    unit="weight scales",
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/compressed-tensors#595", "NVIDIA/Model-Optimizer#1633"),
    engines={
        "vllm": ("error", "loads it silently in experts"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Weight scales, ``pre_quant_scale`` and KV scales are finite, not negative and below 10^8.

    **What it does.** Scans these scales in every format: E4M3 bytes must be below 0x7F, E8M0 bytes
    below 0x9A (2^27), floats finite and not negative. Block scales of W4A8_NVFP4_FP8 are at most
    448/6. MLX's affine scales may be negative, and so may those of integer codes where more than a
    twentieth of them is, as AutoRound writes them; additive terms and low-rank factors only have to
    be finite.

    **Why it happens.** An all-zero expert (0/0), an uncalibrated or infinite amax, or the scales of
    a different algorithm.

    **Impact.** NaN spreads to the whole output for the prompts that reach the block; vLLM loads it
    silently.

    **Fix.** Define the scale of an all-zero block (1.0) and quantize again.
    """
    for _, fmt, sibling, tensor in ctx.candidate.scales_of("scale", "tensor_scale", "pre_quant"):
        dtype = sibling.values_in(tensor.dtype)
        if dtype not in SCALE_BITS:
            continue
        ctx.tally.see(tensor.elements)
        flaws = ctx.payload.flaws(tensor, dtype)
        if SCALE_BITS[dtype].float:
            signs = sibling.signed or _has_signs(fmt, sibling, flaws, tensor)
            yield from _invalid_floats(ctx, tensor, flaws, sibling, signed=signs)
        else:
            yield from _invalid_bytes(ctx, tensor, flaws, dtype)
        if sibling.largest and dtype == "F8_E4M3":
            yield from _beyond(ctx, tensor, sibling.largest)
    for _, _, _, tensor in ctx.candidate.scales_of("bias", "lora", "zero_point"):
        yield from _not_finite(ctx, tensor)
    for _, leaf, tensor in ctx.candidate.cache_scales:
        if leaf in _BIASES:
            yield from _not_finite(ctx, tensor)
        elif tensor.dtype in FLOATS:
            ctx.tally.see(tensor.elements)
            flaws = ctx.payload.flaws(tensor, tensor.dtype)
            yield from _invalid_floats(ctx, tensor, flaws)


def _has_signs(fmt: Format, sibling: Sibling, flaws: FlawHits, tensor: Tensor) -> bool:
    """Whether the scales of integer codes have signs on purpose: AutoRound takes the sign of the
    largest weight, so about half of its scales are negative.
    """
    integers = fmt.weight.codes == "int" and sibling.role == "scale"
    return integers and flaws.negative.count * 20 > tensor.elements


def _invalid_bytes(ctx: Context, tensor: Tensor, flaws: FlawHits, dtype: str) -> Iterator[Finding]:
    problems = ("NaN", flaws.nan), ("negative", flaws.negative), ("implausibly large", flaws.huge)
    for problem, hits in problems:
        if hits.count:
            yield ctx.finding(
                f"{problem} block scales",
                cause=problem,
                where=ctx.at_byte(tensor, hits.first),
                observed=f"0x{hits.value:02X}",
                expected=_BYTES.get(dtype, "0x00..0x99"),
                count=hits.count,
            )


def _beyond(ctx: Context, tensor: Tensor, largest: float) -> Iterator[Finding]:
    """Yield block scales above what the algorithm's conversion to FP8 leaves room for."""
    step = e4m3_table()[:0x7F]
    code = int(np.searchsorted(step, largest * 1.04, side="right"))  # rounded to the nearest
    if ctx.payload.extremes(tensor)[1] < code:
        return
    hits = Hits()
    for start, flat in ctx.payload.pieces(tensor):
        hits.add(start, np.flatnonzero((flat >= code) & (flat < 0x7F)), flat)
    if hits.count:
        yield ctx.finding(
            f"block scales above {largest:.4g}: the values they scale do not fit into FP8",
            cause="beyond the algorithm",
            where=ctx.at_byte(tensor, hits.first),
            observed=float(step[hits.value]),
            expected=f"at most {largest:.4g}, which is 448 / 6",
            count=hits.count,
        )


def _invalid_floats(
    ctx: Context,
    tensor: Tensor,
    flaws: FlawHits,
    sibling: Sibling | None = None,
    *,
    signed: bool = False,
) -> Iterator[Finding]:
    """Yield one finding on NaN, infinite and negative values, one on implausible ones."""
    divisor = sibling is not None and sibling.divisor
    bad = [flaws.nan, flaws.infinite] + ([] if signed else [flaws.negative])
    leaf = tensor.name.rpartition(".")[2]
    yield from _at_floats(
        ctx, tensor, bad, "unusable", f"{leaf} is not a finite positive number", "finite and > 0"
    )
    kind, bound = (flaws.tiny, "at least 1e-08") if divisor else (flaws.huge, "at most 1e+08")
    yield from _at_floats(ctx, tensor, [kind], "implausible", f"{leaf} is implausibly large", bound)


def _not_finite(ctx: Context, tensor: Tensor) -> Iterator[Finding]:
    if tensor.dtype not in FLOATS:
        return
    ctx.tally.see(tensor.elements)
    flaws = ctx.payload.flaws(tensor, tensor.dtype)
    leaf = tensor.name.rpartition(".")[2]
    bad = [flaws.nan, flaws.infinite]
    yield from _at_floats(ctx, tensor, bad, "unusable", f"{leaf} is not finite", "finite")


def _at_floats(
    ctx: Context, tensor: Tensor, kinds: list[Hits], cause: str, message: str, expected: str
) -> Iterator[Finding]:
    found = [hits for hits in kinds if hits.count]
    if found:
        first = min(found, key=lambda hits: hits.first)
        yield ctx.finding(
            message,
            cause=cause,
            where=ctx.at_byte(tensor, SCALE_BITS[tensor.dtype].width * first.first),
            observed=pattern_value(first.value, tensor.dtype),
            expected=expected,
            count=sum(hits.count for hits in found),
        )
