# SPDX-License-Identifier: Apache-2.0
"""QC506: input_scale differs in a fused group."""

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
        "vllm": ("warning", "warns and keeps the largest"),
        "sglang": ("info", "keeps the largest, of the pair or of all experts"),
        "trtllm": ("error", "asserts that w1 and w3, and q, k and v, have the same input_scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections that engines fuse and that read the same input have the same ``input_scale``.

    **What it does.** Compares ``input_scale`` within q/k/v, gate/up and w1/w3; in
    compressed-tensors' form ``input_global_scale``, a divisor.

    **Why it happens.** Each projection has its own quantizer, and one of them saw different tokens.

    **Impact.** TensorRT-LLM stops; others keep the largest, which costs some precision. For
    divisors the largest is the smallest range: it clips.

    **Fix.** Write the group's largest activation amax to all its members.
    """
    leaves = {t.name.rpartition(".")[2] for _, _, _, t in ctx.candidate.scales_of("input")}
    for leaf in sorted(leaves):
        names = [m.name for m in ctx.candidate.quantized_modules if leaf in m.parts]
        for group in scalars(ctx, leaf, names):
            if min(group.values) > 0:  # QC503
                yield from group.differing(ctx)
