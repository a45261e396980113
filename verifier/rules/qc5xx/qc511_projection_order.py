# SPDX-License-Identifier: Apache-2.0
"""QC511: gate and up are exchanged, or split along the wrong rows."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule

SPLIT = frozenset({"gate_proj", "up_proj", "w1", "w3", "k_proj", "v_proj"})


@rule(
    "QC511",
    "projections exchanged or interleaved",
    severity="error",
    depth="payload",
    split=True,
    unit="split projections",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#46641", "NVIDIA/Model-Optimizer#1678", "NVIDIA/TensorRT-LLM#8956"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """``gate`` holds the base's gate and ``up`` its up (``w1``/``w3``, ``k``/``v``), row for row.

    **Why.** A fused tensor was split in the wrong order, or in halves where its rows are
    interleaved (gpt-oss).
    **Hurts.** The activation is applied to the wrong half: fluent at best, wrong throughout.
    **Mend.** Split again as the family stores it. Only a base tells: both halves have the same
    shape and the same statistics, so without one the rule is not run.
    """
    split = [
        m
        for m in ctx.candidate.quantized_modules
        if m.weight is not None and m.name.rpartition(".")[2] in SPLIT
    ]
    for weight, _, r in compared(ctx, split):
        if r.cause == "order":
            yield ctx.finding(
                r.detail,
                tensor=weight.name,
                observed=f"relative error {r.relative:.3f} to its own base weight",
                expected=f"about {r.by_max:.3f}",
            )
