# SPDX-License-Identifier: Apache-2.0
"""QC401: an excluded module carries scales."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC401",
    "excluded module is quantized",
    severity="error",
    depth="header",
    unit="quantized modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#45102", "vllm-project/vllm#45132", "vllm-project/vllm#35660"),
    engines={
        "vllm": ("error", "builds a plain layer and stops at the first scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A module that the config excludes from quantization has no scales on disk.

    **Why.** Config and weights are from different passes.
    **Hurts.** The engine builds a plain layer and meets scales it has no parameter for: vLLM raises
    ValueError (``lm_head.input_scale``), others read codes as weights.
    **Mend.** Drop the pattern, or export the module unquantized. It is an error where the pattern
    names the module exactly, by glob or by ``re:``; a warning where only engines that match
    substrings or parts exclude it.
    """
    declaration = ctx.candidate.declaration
    if declaration is None:
        return
    for module in ctx.candidate.quantized_modules:
        ctx.tally.see()
        if not declaration.exclusions.loose(module.name):
            continue
        pattern = declaration.exclusions.pattern_for(module.name) or ""
        listed = declaration.mixed and declaration.declared_for(module.name).via == "exact"
        part = module.parts.get(module.scales[0]) if module.scales else module.weight
        where = Where(part.name, part.file) if part else Where(module.name)
        if declaration.exclusions.strict(module.name):
            yield ctx.finding(
                f"excluded by {pattern!r}, and carries scales", where=where, observed=pattern
            )
        else:
            also = ", though quantized_layers lists it" if listed else ""
            yield ctx.finding(
                f"carries scales, and engines that match parts of names exclude it by {pattern!r}{also}",
                where=where,
                observed=pattern,
                severity="warning",
                engines=None if listed else _substring(pattern, module.name),
            )


def _substring(pattern: str, module: str) -> dict[str, tuple[Severity, str]] | None:
    if pattern not in module:
        return None
    return {
        "vllm": (
            "error",
            "excludes every name that the pattern stands in, and stops at the first scale",
        )
    }
