# SPDX-License-Identifier: Apache-2.0
"""QC506: projections that engines fuse have different activation scales."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.fusing import scalars
from verifier.rules.registry import rule


@rule(
    "QC506",
    "input_scale differs in a fused group",
    severity="warning",
    depth="payload",
    unit="fused groups",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("TensorRT-LLM load_expert_fc31_input_scale_nvfp4",),
    engines={
        "vllm": ("warning", "keeps the largest and warns"),
        "sglang": ("info", "keeps the largest, of the pair or of all experts"),
        "trtllm": ("error", "asserts that w1 and w3, and q, k and v, have the same input_scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections that engines fuse (q/k/v, gate/up, w1/w3) and that read one input have the same
    ``input_scale``.

    In compressed-tensors' form: ``input_global_scale``, a divisor.
    **Why.** Each projection has a quantizer of its own, and one of them saw other tokens.
    **Hurts.** TensorRT-LLM asserts; others keep the largest, which costs a little precision. Of
    divisors the largest is the smallest range: it clips.
    **Mend.** Write the largest activation amax of the group to all its members.
    """
    for leaf in ("input_scale", "input_global_scale"):
        for group in scalars(
            ctx, leaf, (m.name for m in ctx.candidate.quantized_modules if leaf in m.parts)
        ):
            if min(group.values) > 0:  # QC503
                yield from group.differing(ctx)
