# SPDX-License-Identifier: Apache-2.0
"""QC401: excluded module is quantized."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.kept import is_kept
from verifier.rules.registry import rule
from verifier.schemes import Declaration, Module, expert_key


@rule(
    "QC401",
    "excluded module is quantized",
    severity="error",
    depth="header",
    unit="quantized modules",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#45102", "vllm-project/vllm#45132", "vllm-project/vllm#35660"),
    engines={
        "vllm": ("error", "builds an unquantized layer and stops at the first scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A module that the config excludes from quantization has no scales.

    **What it does.** Matches each quantized module against the exclusions. It is an error if a
    pattern names the module exactly, by glob or by ``re:``, and a warning if only engines that
    match substrings or parts of names exclude it. A module that the base stores in the same
    quantization is sound: readers of the base find it there.

    **Why it happens.** Config and weights come from different passes.

    **Impact.** The engine builds an unquantized layer and finds scales that it has no parameter
    for: vLLM raises ValueError (``lm_head.input_scale``), others read quantized values as plain
    weights.

    **Fix.** Drop the pattern, or export the module unquantized.
    """
    declaration = ctx.candidate.declaration
    if declaration is None:
        return
    modules, exclusions = ctx.candidate.quantized_modules, declaration.exclusions
    ctx.tally.see(len(modules))
    for module in modules:
        excluded = exclusions.loose(module.name)
        if declaration.mixed and not excluded:
            continue  # QC410
        if is_kept(ctx, module):
            continue
        if not excluded:
            yield from _by_other_means(ctx, declaration, module)
            continue
        pattern = exclusions.pattern_for(module.name) or ""
        listed = declaration.mixed and declaration.declared_for(module.name).via == "exact"
        part = module.parts.get(module.scales[0]) if module.scales else module.weight
        where = Where(part.name, part.file) if part else Where(module.name)
        if exclusions.strict(module.name):
            yield ctx.finding(
                f"excluded by {pattern!r}, but has scales",
                cause=f"excluded {pattern}",
                where=where,
                observed=pattern,
            )
        else:
            also = ", although quantized_layers lists it" if listed else ""
            yield ctx.finding(
                f"has scales, but engines that match parts of names exclude it by"
                f" {pattern!r}{also}",
                cause=f"excluded by some {pattern}",
                where=where,
                observed=pattern,
                severity="warning",
                engines=None if listed else _substring_effect(pattern, module.name),
            )


def _by_other_means(ctx: Context, declaration: Declaration, module: Module) -> Iterator[Finding]:
    """Yield a quantized module that a recipe of its own, or no recipe, leaves unquantized."""
    declared = declaration.declared_for(module.name)
    if declared.algo is not None or not declaration.schemes():
        return
    weight = module.weight
    if weight is None:
        return
    if declared.via == "excluded":
        message = f"excluded by {declared.entry!r}, but has scales"
    else:
        message = "has scales, but no target or block of the config covers it"
    yield ctx.finding(
        message,
        cause=f"not covered {declared.entry}",
        where=Where(weight.name, weight.file),
        observed=declared.entry or "no target",
        expected="a recipe for the module, or an unquantized weight",
    )


def _substring_effect(pattern: str, module: str) -> dict[str, tuple[Severity, str]] | None:
    """Return what vLLM does with a module that a pattern excludes as a substring. Of experts it
    asks for their container alone.
    """
    key = expert_key(module)
    if key is not None and pattern not in key.container:
        return {
            "vllm": ("info", "asks for the container of the experts, which it does not exclude")
        }
    if pattern not in module:
        return None
    effect = "excludes every name that contains the pattern, and stops at the first scale"
    return {"vllm": ("error", effect)}
