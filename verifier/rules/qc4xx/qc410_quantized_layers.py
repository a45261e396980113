# SPDX-License-Identifier: Apache-2.0
"""QC410: quantized_layers does not match the modules on disk."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import DeclaredFormat, Module, packed_name, same_layout


@rule(
    "QC410",
    "quantized_layers does not match",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("TensorRT-LLM", "vLLM", "SGLang"),
    sources=("kekzl/imp#1385",),
    engines={
        "vllm": ("error", "builds a module without an entry unquantized"),
        "trtllm": ("error", "drops the scales of what it misses, and activations explode"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Under MIXED_PRECISION each quantized module has an entry of its own, with the format that its
    tensors show.

    **Why.** The list names containers (``…experts``) or fused projections of the exporter's memory.
    **Hurts.** TensorRT-LLM matches names exactly, drops the scales of what it misses, and
    activations explode; vLLM builds a module without any entry unquantized.
    **Mend.** Write one entry for each module on disk. A parent container or an engine's packed name
    that agrees is a warning; no cover at all, another format, or an entry for a plain weight is an
    error.
    """
    declaration = ctx.candidate.declaration
    if declaration is None or not declaration.mixed:
        return
    for alike in ctx.candidate.module_groups:
        ctx.tally.see(len(alike.modules))
        if any(True for _ in _judge(ctx, alike.first, declaration.declared_for(alike.first.name))):
            for module in alike.modules:
                yield from _judge(ctx, module, declaration.declared_for(module.name))
    odd = {
        n: ctx.candidate.modules.get(n)
        for n in declaration.layers
        if n not in ctx.candidate.modules or not ctx.candidate.modules[n].quantized
    }
    parents = (
        {m.rpartition(".")[0] for m in ctx.candidate.modules}
        | {p for m in ctx.candidate.modules if (p := packed_name(m))}
        if odd
        else ()
    )
    for name, found in odd.items():
        if found is not None and not found.quantized and found.weight is not None:
            ctx.tally.see()
            yield ctx.finding(
                f"quantized_layers says {declaration.layers[name].algo}, the weight is {found.weight.dtype}",
                tensor=found.weight.name,
                observed=found.weight.dtype,
                expected=declaration.layers[name].algo,
            )
        elif (
            found is None
            and name not in parents
            and not any(p.startswith(f"{name}.") for p in parents)
        ):
            ctx.tally.see()
            yield ctx.finding(
                f"quantized_layers names {name!r}, which is not on disk",
                where=Where(None, declaration.file),
                observed=name,
                severity="warning",
            )


def _judge(ctx: Context, module: Module, cover: DeclaredFormat) -> Iterator[Finding]:
    part = module.weight or next(iter(module.parts.values()))
    where = Where(part.name, part.file)
    shown = module.inferred_format
    if cover.algo is None:
        yield ctx.finding(
            "no entry of quantized_layers covers this quantized module",
            where=where,
            observed="no entry",
        )
    elif cover.format is not None and shown is not None and not same_layout(cover.format, shown):
        yield ctx.finding(
            f"quantized_layers says {cover.algo}, the tensors are {shown.algo}",
            where=where,
            observed=shown.algo,
            expected=cover.algo,
        )
    elif cover.via in ("container", "packed"):
        kind = "its container" if cover.via == "container" else "the engine's fused name"
        yield ctx.finding(
            f"listed only through {kind}: TensorRT-LLM matches exactly and drops its scales",
            where=where,
            observed=cover.entry,
            expected=module.name,
            severity="warning",
            engines={
                "trtllm": ("error", "matches names exactly and drops the scales of what it misses")
            },
        )
