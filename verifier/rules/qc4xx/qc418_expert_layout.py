# SPDX-License-Identifier: Apache-2.0
"""QC418: quantized modules are in a form that an engine does not load."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.layouts.engine_needs import unread_formats
from verifier.layouts.expert_stacks import Form, UnstackedCheckpoint, stack_layout_of
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import ENGINE_NAMES, ENGINES, Module, expert_key


@rule(
    "QC418",
    "quantized modules are in a form that an engine does not load",
    severity="info",
    depth="header",
    unit="quantized modules",
    consumers=("vLLM", "SGLang"),
    sources=("vLLM 0.32 gpt_oss.py, granitemoe.py, llama4.py, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Quantized modules are stored in a form that the engine loads in this family.

    **What it does.** Compares how the experts of a ModelOpt checkpoint are stored, stacked or
    individually, with what engines load of its family, where that is known
    (docs/expert-layouts.md), and likewise the formats of all modules (vLLM loads MiniMax-M3 in
    MXFP8, but not in FP8 with 128x128 blocks). It is an error with the profile of that engine, and
    a note otherwise.

    **Why it happens.** Loaders of some families know stacks of plain weights only, or formats of
    their own.

    **Impact.** The engine stops, or the experts or scales stay unset.

    **Fix.** ``ckptgate export --for ENGINE`` writes the layout that the engine loads. If there is
    none, leave the experts unquantized, or use a different format or engine.
    """
    yield from _unread(ctx)
    yield from _layouts(ctx)


def _unread(ctx: Context) -> Iterator[Finding]:
    """Yield the formats that an engine does not load in this family."""
    modules: dict[str, list[Module]] = {}
    for module, fmt in ctx.candidate.formatted:
        modules.setdefault(fmt.name, []).append(module)
    for unread in unread_formats(modules, ctx.checkpoint.model_type, ENGINES):
        affected = modules[unread.format]
        ctx.tally.see(len(affected))
        weight = affected[0].weight
        yield ctx.finding(
            f"{ENGINE_NAMES[unread.engine]} loads no modules of this family in this format",
            cause=f"{unread.engine} {unread.format}",
            where=Where(weight.name, weight.file) if weight else Where(affected[0].name),
            observed=unread.format,
            expected="a format that it loads in this family",
            count=len(affected),
            engines={unread.engine: ("error", f"{unread.why} ({unread.source})")},
        )


def _layouts(ctx: Context) -> Iterator[Finding]:
    """Yield the experts that are stored in a layout that an engine does not load."""
    declaration = ctx.candidate.declaration
    layout = stack_layout_of(ctx.checkpoint.config)
    if layout is None or declaration is None or declaration.form not in ("flat", "nested"):
        return
    experts = [m for m in ctx.candidate.quantized_modules if expert_key(m.stem)]
    ctx.tally.see(len(experts))
    if not experts:
        return
    weight = experts[0].weight
    stacked = ctx.checkpoint.stacked if isinstance(ctx.checkpoint, UnstackedCheckpoint) else {}
    form: Form = "hub" if weight is not None and weight.name in stacked else "per-expert"
    for engine, forms in layout.engines.items():
        if form in forms.layouts or form in forms.partly:
            continue
        how = "in stacks" if form == "hub" else "individually"
        yield ctx.finding(
            f"{ENGINE_NAMES[engine]} loads no quantized experts of {layout.name} stored {how}",
            cause=f"{engine} {form}",
            where=Where(weight.name, weight.file) if weight else Where(experts[0].name),
            observed=form,
            expected=" or ".join(forms.layouts) or "unquantized experts",
            count=len(experts),
            engines={engine: ("error", f"{forms.why} ({forms.source})")},
        )
