# SPDX-License-Identifier: Apache-2.0
"""QC418: quantized experts are in a layout that an engine does not load."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.layouts.expert_stacks import Form, UnstackedCheckpoint, stack_layout_of
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import ENGINE_NAMES, expert_key


@rule(
    "QC418",
    "quantized experts are in a layout that an engine does not load",
    severity="info",
    depth="header",
    unit="quantized experts",
    consumers=("vLLM", "SGLang"),
    sources=("vLLM 0.32 gpt_oss.py, granitemoe.py, llama4.py, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Quantized experts are stored in a layout that the engine loads, stacked or individually.

    **What it does.** Compares how the experts of a ModelOpt checkpoint are stored with what
    engines load of its family, where that is known (docs/expert-layouts.md). It is an error with
    the profile of that engine, and a note otherwise.

    **Why it happens.** Loaders of some families know stacks of plain weights only, or formats of
    their own.

    **Impact.** The engine stops, or its experts stay unset.

    **Fix.** ``ckptgate export --for ENGINE`` writes the layout that the engine loads. If there is
    none, leave the experts unquantized, or use a different engine.
    """
    declaration = ctx.candidate.declaration
    layout = stack_layout_of(ctx.checkpoint.config)
    if layout is None or declaration is None or declaration.form not in ("flat", "nested"):
        return
    experts = [m for m in ctx.candidate.quantized_modules if expert_key(m.name)]
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
