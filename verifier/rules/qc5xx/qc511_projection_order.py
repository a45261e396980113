# SPDX-License-Identifier: Apache-2.0
"""QC511: projections are swapped or interleaved."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule

SPLIT = frozenset({"gate_proj", "up_proj", "w1", "w3", "k_proj", "v_proj"})


@rule(
    "QC511",
    "projections are swapped or interleaved",
    severity="error",
    depth="payload",
    split=True,
    unit="split projections",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#46641", "NVIDIA/Model-Optimizer#1678", "NVIDIA/TensorRT-LLM#8956"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """``gate`` holds the base's gate and ``up`` its up, row for row; so do ``k`` and ``v``.

    **What it does.** Compares the dequantized weight with both projections of the base, in both
    orders and interleavings. The projections have the same shape and similar statistics, so the
    rule needs a base.

    **Why it happens.** A fused tensor was split in the wrong order, or in halves although its rows
    are interleaved (gpt-oss).

    **Impact.** The activation is applied to the wrong half: the output is fluent at best, and wrong
    throughout.

    **Fix.** Split the tensor again in the family's order.
    """
    split = [
        m
        for m in ctx.candidate.quantized_modules
        if m.weight is not None and m.name.rpartition(".")[2] in SPLIT
    ]
    for weight, _, result in compared(ctx, split):
        if result.cause == "order":
            yield ctx.finding(
                result.detail,
                tensor=weight.name,
                observed=f"relative error {result.relative:.3f} to its own base weight",
                expected=f"about {result.by_max:.3f}",
            )
