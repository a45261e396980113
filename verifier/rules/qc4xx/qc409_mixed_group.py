# SPDX-License-Identifier: Apache-2.0
"""QC409: mixed formats in a fused group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import (
    ENGINE_NAMES,
    Engine,
    Fusion,
    Module,
    engine_groups,
    fusable,
    fused_groups,
)

ENGINES: tuple[Engine, ...] = ("vllm",)
"""The engines that fuse more than others do."""


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
    is not checked. A member that contradicts its declaration is QC305, QC408 or QC410. MiniMax-M3's
    indexer is in vLLM's fused qkv_proj only: an error for vLLM, and a warning otherwise.

    **Why it happens.** A search or a pattern chose the format of each projection separately.

    **Impact.** vLLM stops with "Mixed quant_algo within fused layer", or builds the fused layer in
    one member's format and misreads the others. In MiniMax-M3 the indexer's part of a quantized
    qkv_proj stays unset, or there is no place for its per-tensor scales.

    **Fix.** Give all members the same format, or leave all of them unquantized.
    """
    names = [m.name for m in ctx.candidate.linears]
    for _, members in fused_groups(names, ctx.checkpoint.model_type):
        modules = [ctx.candidate.modules[m] for m in members]
        formats = [ctx.candidate.format_of(m) for m in modules]
        if formats[0] is not None and len(set(formats)) == 1:
            ctx.tally.see()
            continue
        if not any(m.quantized for m in modules):
            continue
        if any(m.quantized and f is None for m, f in zip(modules, formats, strict=True)):
            continue  # QC305, QC408 or QC410
        ctx.tally.see()
        mismatch = _mismatch(ctx, modules)
        if mismatch is not None and mismatch.weight is not None:
            yield ctx.finding(
                "format differs from the other projections of a fused group",
                cause="format",
                where=Where(mismatch.weight.name, mismatch.weight.file),
                observed=_name(ctx, mismatch),
                expected=f"{_name(ctx, modules[0])} like {modules[0].name}",
            )
    for engine in ENGINES:
        for fusion, members in engine_groups(names, ctx.checkpoint.model_type, engine):
            ctx.tally.see()
            yield from _of_one_engine(ctx, engine, fusion, members)


def _of_one_engine(
    ctx: Context, engine: Engine, fusion: Fusion, members: tuple[str, ...]
) -> Iterator[Finding]:
    """Yield what keeps one engine from loading a group that it alone fuses."""
    modules = [ctx.candidate.modules[m] for m in members]
    formats = [ctx.candidate.format_of(m) for m in modules]
    name, first = ENGINE_NAMES[engine], formats[0]
    if first is None or any(
        m.quantized and f is None for m, f in zip(modules, formats, strict=True)
    ):
        return  # unquantized, or QC305, QC408 or QC410
    mismatch = _mismatch(ctx, modules)
    if mismatch is not None and mismatch.weight is not None:
        yield ctx.finding(
            f"format differs from the other projections of {name}'s {fusion.parameter}",
            cause=f"format {name}",
            where=Where(mismatch.weight.name, mismatch.weight.file),
            observed=_name(ctx, mismatch),
            expected=f"{first.algo} like {modules[0].name}",
            severity="warning",
            engines={engine: ("error", f"never sets its part of {fusion.parameter}, or stops")},
        )
    elif not fusion.holds(first, members):
        odd = next(m for m in modules if not fusion.holds(first, [m.name]))
        yield ctx.finding(
            f"{name}'s {fusion.parameter} has no place for its per-tensor scales",
            cause=f"tensor scales {name}",
            where=Where(f"{odd.name}.weight"),
            observed=first.algo,
            expected="MXFP8 or FP8 in blocks, or the whole group unquantized",
            severity="warning",
            engines={engine: ("error", f"AssertionError while loading ({fusion.source})")},
        )


def _mismatch(ctx: Context, modules: Sequence[Module]) -> Module | None:
    """Return the first module whose format is not that of the first."""
    return next((m for m in modules[1:] if not _same_format(ctx, modules[0], m)), None)


def _same_format(ctx: Context, first: Module, second: Module) -> bool:
    a, b = ctx.candidate.format_of(first), ctx.candidate.format_of(second)
    return a is b if a is None or b is None else fusable(a, b)


def _name(ctx: Context, module: Module) -> str:
    fmt = ctx.candidate.format_of(module)
    dtype = module.weight.dtype if module.weight else ""
    return fmt.algo if fmt else f"unquantized {dtype}".strip()
