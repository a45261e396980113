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
from verifier.schemes import Format, Module


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
    """No block scale, global scale or tensor scale is zero.

    **What it does.** Scans all weight scales. A zero scale of an all-zero block is a warning.

    **Why it happens.** A block's scale falls below 2^-9 and rounds to zero in E4M3, because the
    exporter does not clamp it.

    **Impact.** Every value of the block reads as zero; a zero ``weight_scale_2`` erases the whole
    tensor.

    **Fix.** Clamp the scale to 2^-9 before the cast and quantize again. Nothing is lost if the
    block is all zero.
    """
    for module, fmt, tensor in ctx.candidate.scale_tensors(("weight_scale", "weight_scale_inv")):
        ctx.tally.see(tensor.elements)
        if tensor.dtype == "F8_E4M3":
            low, high = ctx.payload.extremes(tensor)
            if low == 0 or high >= 0x80:
                yield from _zero_blocks(ctx, module, fmt, tensor)
        elif tensor.dtype == "F32":
            yield from _zero_floats(ctx, tensor)
    for _, _, tensor in ctx.candidate.scale_tensors(("weight_scale_2",)):
        ctx.tally.see(tensor.elements)
        yield from _zero_floats(ctx, tensor)


def _zero_blocks(ctx: Context, module: Module, fmt: Format, tensor: Tensor) -> Iterator[Finding]:
    """Yield zero block scales: those of blocks that are lost, and those of all-zero blocks."""
    weight, size = module.weight, (fmt.group_size or 0) // 2
    fits = weight is not None and size and weight.nbytes == tensor.nbytes * size
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
                where=ctx.at_byte(tensor, hits.first),
                observed=f"0x{hits.value:02X}",
                expected="0x01..0x7E",
                count=hits.count,
                severity=severity,
            )


def _zero_floats(ctx: Context, tensor: Tensor) -> Iterator[Finding]:
    values = ctx.payload.array(tensor).reshape(-1)
    zero = np.flatnonzero(values == 0)
    if zero.size:
        leaf = tensor.name.rpartition(".")[2]
        yield ctx.finding(
            f"zero {leaf}: everything it scales reads as zero",
            where=ctx.at_byte(tensor, 4 * int(zero[0])),
            observed=0.0,
            expected="> 0",
            count=int(zero.size),
        )
