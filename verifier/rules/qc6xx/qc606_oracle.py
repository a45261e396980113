# SPDX-License-Identifier: Apache-2.0
"""QC606: what transformers cannot vouch for, and what was done instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import role

_SILENT: Mapping[str, tuple[Severity, str]] = {
    "transformers": (
        "error",
        "dequantizes experts without their global scale, silently (transformers#48371)",
    )
}
_STOPS: Mapping[str, tuple[Severity, str]] = {
    "transformers": (
        "error",
        "has no quantizer for it: it stops at packed shapes, or reads codes as values",
    )
}


@rule(
    "QC606",
    "transformers is no oracle",
    severity="info",
    depth="load",
    unit="formats and loads",
    consumers=("transformers",),
    sources=("huggingface/transformers#48371", "huggingface/transformers#48372"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The format is one that transformers reads by itself, and its load leaves no tensor out.

    Where it does not, QC608 is still judged: the verifier decodes each weight and hands the loader
    plain BF16 values under hub names. This rule says so, and what that load leaves out: names that
    the model's class drops on purpose (MTP), what does not fit in the base's own load either, and a
    family that transformers does not have, of which names and shapes are judged by the layout files
    and the base alone.

    **Why.** transformers 5 has no quantizer for ModelOpt's NVFP4, MXFP8 and FP8. Of experts in
    compressed-tensors' NVFP4 it loses the global scale when it fuses them: weights are wrong by a
    factor of thousands, and nothing is said.
    **Hurts.** A perplexity or a reload that was measured through transformers' own quantizers says
    nothing of the file.
    **Mend.** Nothing in the checkpoint. Measure with an engine, or with `ckptgate gate`, which
    decodes as this does.
    """
    loaded = ctx.loaded
    method = (
        ctx.candidate.declarations.effective.method if ctx.candidate.declarations.effective else ""
    )
    for name in dict.fromkeys(f.name for _, f in ctx.candidate.formatted):
        ctx.tally.see()
        modules = [m for m, f in ctx.candidate.formatted if f.name == name]
        algo = next(f.algo for _, f in ctx.candidate.formatted if f.name == name)
        experts = [m for m in modules if role(m.name) == "routed_expert"]
        if name == "nvfp4_ct" and experts:
            yield ctx.finding(
                f"{algo}: transformers' own path loses the global scale of experts; decoded here instead",
                tensor=f"{experts[0].name}.weight_packed",
                observed=f"{len(experts):,} experts' projections",
                engines=_SILENT,
            )
        elif not loaded.native:
            yield ctx.finding(
                f"{algo}: transformers has no quantizer for it; decoded here instead",
                tensor=modules[0].weight.name if modules[0].weight else None,
                observed=f"{loaded.loader}, quant_method {method!r}",
                engines=_STOPS,
            )
    ctx.tally.see()
    if loaded.reason:
        yield ctx.finding(
            "transformers does not build this model; names and shapes are judged by layout files and base alone",
            where=Where(None, "config.json"),
            observed=loaded.reason,
        )
    if loaded.dropped:
        yield ctx.finding(
            "transformers drops these tensors on purpose; its load says nothing of them",
            tensor=loaded.dropped[0],
            observed=f"{len(loaded.dropped):,} tensors",
        )
    if loaded.shared:
        first = loaded.shared[0]
        yield ctx.finding(
            "does not fit in the base's own load either; not held against the export",
            where=Where(first.name),
            observed=f"{len(loaded.shared):,} names, {first.kind}",
        )
