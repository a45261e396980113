# SPDX-License-Identifier: Apache-2.0
"""QC501: zero weight scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Severity
from verifier.payload.scan import Hits
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import SCALE_BITS, Format, Module, Sibling

_BIASES = frozenset({"k_bias", "v_bias"})


@rule(
    "QC501",
    "zero weight scale",
    severity="error",
    depth="payload",
    unit="weight scales",
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1382",),
    engines={
        "vllm": ("error", "loads it silently"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """No block scale, global scale, tensor scale, KV scale or ``pre_quant_scale`` is zero.

    **What it does.** Scans these scales in every format. A zero scale of a block whose quantized
    values are all zero, too, is a warning. E8M0 has no zero: what a cast leaves there
    is QC512. Input scales are QC503.

    **Why it happens.** A block's scale falls below 2^-9 and rounds to zero in E4M3, because the
    exporter does not clamp it, or a scale of the cache was never calibrated.

    **Impact.** Every value of the block reads as zero; a zero ``weight_scale_2`` erases the whole
    tensor. Engines divide by a divisor (``weight_global_scale``) and by the scales of the cache:
    infinity, then NaN.

    **Fix.** Clamp the scale to 2^-9 before the cast and quantize again. Nothing is lost if the
    block is all zero.
    """
    for module, fmt, sibling, tensor in ctx.candidate.scales_of(
        "scale", "tensor_scale", "pre_quant"
    ):
        dtype = sibling.values_in(tensor.dtype)
        if dtype not in SCALE_BITS:
            continue
        ctx.tally.see(tensor.elements)
        if SCALE_BITS[dtype].float:
            yield from _zero_floats(ctx, tensor, _effect(sibling))
        elif ctx.payload.flaws(tensor, dtype).zero.count:
            yield from _zero_blocks(ctx, module, fmt, tensor)
    for _, leaf, tensor in ctx.candidate.cache_scales:
        if leaf not in _BIASES and tensor.dtype in SCALE_BITS and SCALE_BITS[tensor.dtype].float:
            ctx.tally.see(tensor.elements)
            yield from _zero_floats(ctx, tensor, "dividing the KV cache by it gives infinity")


def _effect(sibling: Sibling) -> str:
    if sibling.role == "pre_quant":
        return "the layer ignores these inputs"
    if sibling.divisor:
        return "dividing by it gives infinity"
    return "everything it scales reads as zero"


def _zero_blocks(ctx: Context, module: Module, fmt: Format, tensor: Tensor) -> Iterator[Finding]:
    """Yield zero block scales: those of blocks that are lost, and those of all-zero blocks."""
    weight, size = module.weight, (fmt.group_size or 0) // 2
    in_order = fmt.weight.codes == "e2m1" and fmt.rowwise and size > 0
    fits = weight is not None and in_order and weight.nbytes == tensor.nbytes * size
    lost, harmless = Hits(), Hits()
    for start, flat in ctx.payload.pieces(tensor):
        zero = np.flatnonzero((flat & 0x7F) == 0)
        if not zero.size:
            continue
        nonzero = zero
        if weight is not None and fits:
            first, last = int(zero[0]), int(zero[-1]) + 1
            codes = ctx.checkpoint.read_range(
                weight, (start + first) * size, (last - first) * size
            ).reshape(-1, size)
            nonzero = zero[((codes[zero - first] & 0x77) != 0).any(axis=1)]
        lost.add(start, nonzero, flat)
        harmless.add(start, np.setdiff1d(zero, nonzero), flat)
    levels: tuple[tuple[Hits, Severity, str], ...] = (
        (lost, "error", "zero block scales: these blocks read as zero"),
        (harmless, "warning", "zero block scales of all-zero blocks"),
    )
    for hits, severity, message in levels:
        if hits.count:
            yield ctx.finding(
                message,
                cause="zero",
                where=ctx.at_byte(tensor, hits.first),
                observed=f"0x{hits.value:02X}",
                expected="0x01..0x7E",
                count=hits.count,
                severity=severity,
            )


def _zero_floats(ctx: Context, tensor: Tensor, effect: str) -> Iterator[Finding]:
    zero = ctx.payload.flaws(tensor, tensor.dtype).zero
    if zero.count:
        leaf = tensor.name.rpartition(".")[2]
        yield ctx.finding(
            f"zero {leaf}: {effect}",
            cause="zero",
            where=ctx.at_byte(tensor, SCALE_BITS[tensor.dtype].width * zero.first),
            observed=0.0,
            expected="> 0",
            count=zero.count,
        )
