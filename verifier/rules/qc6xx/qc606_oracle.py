# SPDX-License-Identifier: Apache-2.0
"""QC606: transformers cannot validate this format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format, Module, role
from verifier.text import counted

_LOSES_GLOBAL_SCALE: Mapping[str, tuple[Severity, str]] = {
    "transformers": (
        "error",
        "dequantizes experts without their global scale, silently (transformers#48371)",
    )
}
_NO_QUANTIZER: Mapping[str, tuple[Severity, str]] = {
    "transformers": (
        "error",
        "has no quantizer for it: stops at packed shapes, or reads packed values as weights",
    )
}


@rule(
    "QC606",
    "transformers cannot validate this format",
    severity="info",
    depth="load",
    unit="formats and loads",
    consumers=("transformers",),
    sources=("huggingface/transformers#48371", "huggingface/transformers#48372"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The format is one that transformers reads by itself, and its load covers every tensor.

    **What it does.** Reports what a load with transformers cannot vouch for. QC608 still loads the
    checkpoint: the verifier dequantizes each weight and passes plain BF16 values under Hub names to
    the loader. Not covered by that load are tensors that the model class drops on purpose (MTP),
    those that do not fit in the base's own load either, and families that transformers does not
    have, whose names and shapes are checked only against the layout files and the base.

    **Why it happens.** transformers 5 has no quantizer for ModelOpt's NVFP4, MXFP8 and FP8. For
    experts in compressed-tensors' NVFP4 it silently loses the global scale when it fuses them:
    weights are wrong by a factor of thousands.

    **Impact.** A perplexity or a reload measured through transformers' own quantizers says nothing
    about the file.

    **Fix.** Nothing in the checkpoint. Measure with an engine, or with ``ckptgate gate``, which
    dequantizes as the verifier does.
    """
    loaded = ctx.loaded
    declaration = ctx.candidate.declarations.effective
    method = declaration.method if declaration else ""
    by_format: dict[Format, list[Module]] = {}
    for module, fmt in ctx.candidate.formatted:
        by_format.setdefault(fmt, []).append(module)
    for fmt, modules in by_format.items():
        ctx.tally.see()
        experts = [m for m in modules if role(m.name) == "routed_expert"]
        if fmt.name == "nvfp4_ct" and experts:
            yield ctx.finding(
                f"{fmt.algo}: transformers loses the global scale of experts;"
                " dequantized here instead",
                cause="global scale",
                tensor=f"{experts[0].name}.weight_packed",
                observed=counted(len(experts), "expert projection"),
                engines=_LOSES_GLOBAL_SCALE,
            )
        elif not loaded.native:
            yield ctx.finding(
                f"{fmt.algo}: transformers has no quantizer for it; dequantized here instead",
                cause="no quantizer",
                tensor=modules[0].weight.name if modules[0].weight else None,
                observed=f"{loaded.loader}, quant_method {method or 'not declared'}",
                engines=_NO_QUANTIZER,
            )
    ctx.tally.see()
    if loaded.reason:
        yield ctx.finding(
            "transformers cannot build this model; names and shapes are checked only against"
            " the layout files and the base",
            cause="not built",
            where=Where(None, "config.json"),
            observed=loaded.reason,
        )
    if loaded.dropped:
        yield ctx.finding(
            "transformers drops these tensors on purpose; its load does not check them",
            cause="dropped",
            tensor=loaded.dropped[0],
            observed=counted(len(loaded.dropped), "tensor"),
        )
    if loaded.shared:
        first = loaded.shared[0]
        yield ctx.finding(
            "does not fit in the base's own load either; not reported as an error",
            cause="does not fit in the base",
            where=Where(first.name),
            observed=f"{counted(len(loaded.shared), 'name')}, {first.kind}",
        )
