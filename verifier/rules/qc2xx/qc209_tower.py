# SPDX-License-Identifier: Apache-2.0
"""QC209: vision/audio tower is quantized or carries wrapper names."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, role


@rule(
    "QC209",
    "vision/audio tower is quantized or carries wrapper names",
    severity="error",
    depth="header",
    unit="tower modules and exclusions",
    consumers=("SGLang", "vLLM"),
    sources=("sgl-project/sglang#24927", "sgl-project/sglang#35792", "NVIDIA/Model-Optimizer#1687"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Towers are unquantized, and no name or exclusion contains a wrapper's part (``.linear``).

    **What it does.** Reports wrapper parts in tensor names and in exclusions. A quantized module of
    a vision or audio tower is a warning; it is not reported if the base or ``--merged-from`` has
    the module quantized as well. A module that is both excluded and quantized is QC401; a wrong
    prefix is QC201 or QC202.

    **Why it happens.** Calibration wraps the tower's linear layers, and the wrappers' names end up
    in the ignore list or in the keys.

    **Impact.** The exclusion matches nothing, the engine builds the tower quantized and finds no
    scales: a crash, or images that the model does not see.

    **Fix.** Strip the wrapper's part from names and exclusions; export the tower in the source's
    dtype.
    """
    for name, expected_name in ctx.expectations.naming.wrapped:
        ctx.tally.see()
        yield ctx.finding(
            "the name contains the part of a wrapper module",
            cause="wrapper",
            tensor=name,
            observed=name,
            expected=expected_name,
        )
    declaration = ctx.candidate.declaration
    ctx.tally.see(len(declaration.exclude) if declaration else 0)
    for pattern, plain in ctx.expectations.wrapped_exclusions.items():
        yield ctx.finding(
            "the exclusion matches a module only without the part of a wrapper module",
            cause=f"exclusion {pattern}",
            where=Where(None, declaration.file if declaration else None),
            observed=pattern,
            expected=plain,
        )
    for module in ctx.candidate.modules.values():
        if role(module.stem) != "vision":
            continue
        ctx.tally.see()
        weight, fmt = module.weight, module.inferred_format
        if not module.quantized or weight is None:
            continue
        if not _excluded(ctx, module) and not _quantized_in_source(ctx, module):
            yield ctx.finding(
                "a module of the vision or audio tower is quantized",
                cause="tower",
                tensor=weight.name,
                observed=fmt.algo if fmt else weight.dtype,
                expected="the source's dtype",
                severity="warning",
            )


def _excluded(ctx: Context, module: Module) -> bool:
    declaration = ctx.candidate.declaration
    return declaration is not None and declaration.exclusions.loose(module.name)


def _quantized_in_source(ctx: Context, module: Module) -> bool:
    """Whether the checkpoint that this one was made from has the module quantized."""
    for source in (ctx.merged_from, ctx.base):
        original = source.modules.get(module.name) if source else None
        if original is not None and original.quantized:
            return True
    return False
