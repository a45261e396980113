# SPDX-License-Identifier: Apache-2.0
"""QC505: global scale differs in a fused group."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.fusing import scalars
from verifier.rules.registry import rule
from verifier.schemes import expert_key


@rule(
    "QC505",
    "global scale differs in a fused group",
    severity="error",
    depth="payload",
    unit="fused groups",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM ModelOptNvFp4LinearMethod", "vllm-project/vllm#54974"),
    engines={
        "vllm": (
            "error",
            "warns and keeps the largest weight_scale_2 (for divisors the smallest scale)",
        ),
        "sglang": ("error", "silently keeps the largest"),
        "trtllm": ("error", "asserts that all are equal"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections that engines fuse (q/k/v, gate/up) have bit-identical global weight scales.

    **What it does.** Compares ``weight_scale_2`` of q/k/v and of gate/up in dense layers and shared
    experts; for compressed-tensors also ``weight_global_scale`` of routed experts. Gate and
    up of a routed expert in ModelOpt's form are QC504. FP8 per-tensor scales may differ: there are
    no block scales, and engines requantize.

    **Why it happens.** Each projection was calibrated on its own maximum.

    **Impact.** Engines fuse the group and keep one scale without recomputing the block scales, so
    every other member is wrong by the ratio.

    **Fix.** Calibrate the group with its largest amax and recompute the block scales.
    """
    scales = ctx.candidate.scales_of("tensor_scale")
    leaves = {t.name.rpartition(".")[2] for _, _, sibling, t in scales if sibling.scalar}
    for leaf in sorted(leaves):
        names = [
            m.name
            for m in ctx.candidate.quantized_modules
            if leaf in m.parts and not (leaf == "weight_scale_2" and expert_key(m.name))
        ]
        for group in scalars(ctx, leaf, names):
            low, high = min(group.values), max(group.values)
            yield from group.differing(ctx, f" (ratio {f'{high / low:.3g}' if low > 0 else 'inf'})")
