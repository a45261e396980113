# SPDX-License-Identifier: Apache-2.0
"""QC203: fused tensor where the layout has separate ones."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC203",
    "fused tensor where the layout has separate ones",
    severity="error",
    depth="header",
    unit="tensors",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "NVIDIA/Model-Optimizer#1833",
        "NVIDIA/Model-Optimizer#1187",
        "vllm-project/vllm#36997",
    ),
    engines={
        "vllm": (
            "error",
            "skips the stack in MiniMax-M3, so every expert is uninitialized; stops in Qwen3-MoE",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Experts and projections that the Hub layout stores separately are stored separately.

    **What it does.** Reports 3-D expert stacks and fused projections such as ``gate_up_proj`` where
    the layout has one tensor per part.

    **Why it happens.** transformers 5 holds experts as [experts, out, in] stacks and fuses some
    linear layers; the exporter saved those tensors.

    **Impact.** vLLM's MiniMax-M3 loader silently skips the stack and every expert stays
    uninitialized; its Qwen3-MoE loader raises AttributeError.

    **Fix.** Unstack and unfuse before saving, scales together with their weights.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    for name, count in ctx.expectations.naming.fused:
        tensor = ctx.checkpoint.tensors.get(name)
        yield ctx.finding(
            "fused tensor where the layout has one per part",
            tensor=name,
            observed=f"{tensor.dtype} {list(tensor.shape)}" if tensor else name,
            expected=counted(count, "tensor"),
        )
