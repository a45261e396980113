# SPDX-License-Identifier: Apache-2.0
"""QC203: one tensor where the hub layout has several."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC203",
    "fused where the layout is split",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "NVIDIA/Model-Optimizer#1833",
        "NVIDIA/Model-Optimizer#1187",
        "vllm-project/vllm#36997",
    ),
    engines={
        "vllm": (
            "error",
            "skips the stack in MiniMax-M3 and every expert stays uninitialised; stops in Qwen3-MoE",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Experts and projections that the hub keeps apart are apart: no 3-D expert stack, no
    ``gate_up_proj``.

    **Why.** transformers 5 holds experts as [experts, out, in] stacks and some linears fused; the
    exporter saved those.
    **Hurts.** vLLM's MiniMax-M3 loader skips the stack without a word and every expert stays
    uninitialised; Qwen3-MoE's raises AttributeError.
    **Mend.** Un-stack and un-fuse before saving, scales with their weights.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    for name, count in ctx.expectations.naming.fused:
        tensor = ctx.checkpoint.tensors.get(name)
        yield ctx.finding(
            "a fused tensor where the hub layout has one for each part",
            tensor=name,
            observed=f"{tensor.dtype} {list(tensor.shape)}" if tensor else name,
            expected=f"{count} tensors",
        )
