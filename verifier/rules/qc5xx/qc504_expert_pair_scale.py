# SPDX-License-Identifier: Apache-2.0
"""QC504: weight_scale_2 differs within an expert."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import expert_key, fused_groups


@rule(
    "QC504",
    "weight_scale_2 differs within an expert",
    severity="error",
    depth="payload",
    unit="expert pairs",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#54974", "NVIDIA/TensorRT-LLM#14199", "NVIDIA/Model-Optimizer#1411"),
    engines={
        "vllm": ("error", "warns and keeps the scale of gate (w1) for both"),
        "sglang": (
            "warning",
            "keeps both with its trtllm and cutedsl backends; Marlin warns and keeps gate's",
        ),
        "trtllm": (
            "error",
            "asserts that they are equal, or takes the larger, depending on the version",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``w1`` and ``w3`` (gate and up) of a routed expert have bit-identical ``weight_scale_2``.

    **What it does.** Compares ``weight_scale_2`` within each pair. Other dtypes or shapes are QC315
    and QC306.

    **Why it happens.** Each projection was calibrated on its own maximum.

    **Impact.** Engines fuse both projections and keep one scale, that of gate, so up is wrong by
    the ratio (up to 10 in a public checkpoint). vLLM only warns; TensorRT-LLM stops or takes the
    maximum.

    **Fix.** Calibrate both with the larger amax and recompute the block scales.
    """
    experts = [
        m.name
        for m in ctx.candidate.quantized_modules
        if expert_key(m.name) and "weight_scale_2" in m.parts
    ]
    for _, members in fused_groups(experts):
        tensors = [ctx.candidate.modules[m].parts["weight_scale_2"] for m in members]
        if any(t.dtype != "F32" or not t.elements for t in tensors):  # QC315, QC306
            continue
        ctx.tally.see()
        values = [ctx.payload.array(t).reshape(-1) for t in tensors]
        if any(v.tobytes() != values[0].tobytes() for v in values[1:]):
            low, high = min(float(v[0]) for v in values), max(float(v[0]) for v in values)
            ratio = f"{high / low:.3g}" if low > 0 else "inf"
            yield ctx.finding(
                "weight_scale_2 differs between gate and up of an expert",
                where=Where(tensors[1].name, tensors[1].file, byte=tensors[1].offset),
                observed=f"{float(values[1][0]):.6e} (ratio {ratio})",
                expected=f"{float(values[0][0]):.6e}",
            )
