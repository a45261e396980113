# SPDX-License-Identifier: Apache-2.0
"""QC409: projections that engines fuse have different formats."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, fused_groups, same_layout


@rule(
    "QC409",
    "mixed formats in a fused group",
    severity="error",
    depth="header",
    unit="fused groups",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/llm-compressor#2730", "vLLM _resolve_quant_algo"),
    engines={
        "vllm": ("error", "stops: mixed quant_algo within a fused layer"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections that engines fuse into one parameter (q/k/v, gate/up, w1/w3) have one format, or
    none.

    **Why.** A search or a pattern chose the format of each projection by itself.
    **Hurts.** vLLM stops with "Mixed quant_algo within fused layer", or builds the fused layer in
    one member's format and reads the others as that.
    **Mend.** Give all members the same format.
    """
    for _, members in fused_groups(m.name for m in ctx.candidate.linears):
        modules = [ctx.candidate.modules[m] for m in members]
        if not any(m.quantized for m in modules):
            continue
        if any(m.quantized and ctx.candidate.format_of(m) is None for m in modules):
            continue  # a member that contradicts its declaration is QC305's, QC408's or QC410's
        ctx.tally.see()
        odd = next((m for m in modules[1:] if not _same(ctx, modules[0], m)), None)
        if odd is not None and odd.weight is not None:
            yield ctx.finding(
                "fused with projections of another format",
                where=Where(odd.weight.name, odd.weight.file),
                observed=_name(ctx, odd),
                expected=f"{_name(ctx, modules[0])}, as {modules[0].name}",
            )


def _same(ctx: Context, a: Module, b: Module) -> bool:
    ours, theirs = ctx.candidate.format_of(a), ctx.candidate.format_of(b)
    if ours is None or theirs is None:
        return ours is theirs
    return same_layout(ours, theirs)


def _name(ctx: Context, module: Module) -> str:
    found = ctx.candidate.format_of(module)
    return (
        found.algo
        if found
        else f"unquantized {module.weight.dtype if module.weight else ''}".strip()
    )
