# SPDX-License-Identifier: Apache-2.0
"""QC505: projections that engines fuse have different global weight scales."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.fusing import scalars
from verifier.rules.registry import rule
from verifier.schemes import expert_key

LEAVES = ("weight_scale_2", "weight_global_scale")


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
            "keeps the largest weight_scale_2 (of divisors too: the smallest scale) and warns",
        ),
        "sglang": ("error", "keeps the largest without a word"),
        "trtllm": ("error", "asserts that all are equal"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """q/k/v, and gate/up of a dense layer or a shared expert, have the same ``weight_scale_2``, bit
    for bit.

    In compressed-tensors' form the same holds for ``weight_global_scale``, of routed experts too.
    **Why.** Each projection was calibrated on its own maximum.
    **Hurts.** Engines fuse the group and keep one scale; block scales are not computed again, so
    every other member is wrong by the ratio.
    **Mend.** Calibrate the group with its largest amax and encode the block scales under that.
    (Gate and up of a routed expert in ModelOpt's form are QC504. FP8 has one scale a tensor and no
    block scales: engines encode it again.)
    """
    for leaf in LEAVES:
        names = [
            m.name
            for m in ctx.candidate.quantized_modules
            if leaf in m.parts and not (leaf == "weight_scale_2" and expert_key(m.name))
        ]
        for group in scalars(ctx, leaf, names):
            low, high = min(group.values), max(group.values)
            yield from group.differing(ctx, f" (ratio {f'{high / low:.3g}' if low > 0 else 'inf'})")
