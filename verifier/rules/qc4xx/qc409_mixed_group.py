# SPDX-License-Identifier: Apache-2.0
"""QC409: mixed formats in a fused group."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, fusable, fused_groups


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
    """Projections that engines fuse into one parameter have one format.

    **What it does.** Compares the formats of each fused group; a group without any quantized member
    is not checked. A member that contradicts its declaration is QC305, QC408 or QC410.

    **Why it happens.** A search or a pattern chose the format of each projection separately.

    **Impact.** vLLM stops with "Mixed quant_algo within fused layer", or builds the fused layer in
    one member's format and misreads the others.

    **Fix.** Give all members the same format.
    """
    names = [m.name for m in ctx.candidate.linears]
    for _, members in fused_groups(names, ctx.checkpoint.model_type):
        modules = [ctx.candidate.modules[m] for m in members]
        if not any(m.quantized for m in modules):
            continue
        if any(m.quantized and ctx.candidate.format_of(m) is None for m in modules):
            continue  # QC305, QC408 or QC410
        ctx.tally.see()
        mismatch = next((m for m in modules[1:] if not _same_format(ctx, modules[0], m)), None)
        if mismatch is not None and mismatch.weight is not None:
            yield ctx.finding(
                "format differs from the other projections of a fused group",
                where=Where(mismatch.weight.name, mismatch.weight.file),
                observed=_name(ctx, mismatch),
                expected=f"{_name(ctx, modules[0])} like {modules[0].name}",
            )


def _same_format(ctx: Context, first: Module, second: Module) -> bool:
    a, b = ctx.candidate.format_of(first), ctx.candidate.format_of(second)
    return a is b if a is None or b is None else fusable(a, b)


def _name(ctx: Context, module: Module) -> str:
    fmt = ctx.candidate.format_of(module)
    dtype = module.weight.dtype if module.weight else ""
    return fmt.algo if fmt else f"unquantized {dtype}".strip()
