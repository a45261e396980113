# SPDX-License-Identifier: Apache-2.0
"""QC504: gate and up of an expert have different global scales."""

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
        "vllm": ("error", "keeps the scale of gate (w1) for both and warns"),
        "sglang": (
            "warning",
            "keeps both under its trtllm and cutedsl backends; Marlin keeps gate's and warns",
        ),
        "trtllm": ("error", "asserts that they are equal, or takes the larger, by version"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``w1`` and ``w3`` (gate and up) of a routed expert have the same ``weight_scale_2``, bit for
    bit.

    **Why.** Each projection was calibrated on its own maximum.
    **Hurts.** Engines fuse both and keep one scale, the gate's: up is then wrong by the ratio (up
    to 10 in a public checkpoint). vLLM warns only; TensorRT-LLM asserts or takes the maximum.
    **Mend.** Calibrate both with the larger amax and encode the block scales again under it.
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
                "the pair's weight_scale_2 differ",
                where=Where(tensors[1].name, tensors[1].file, byte=tensors[1].offset),
                observed=f"{float(values[1][0]):.6e} (ratio {ratio})",
                expected=f"{float(values[0][0]):.6e}",
            )
