# SPDX-License-Identifier: Apache-2.0
"""QC209: a vision or audio tower is quantized, or a wrapper's name is left in names and
exclusions.
"""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, role


@rule(
    "QC209",
    "tower quantized, or a wrapper's name",
    severity="error",
    depth="header",
    unit="tower modules and exclusions",
    consumers=("SGLang", "vLLM"),
    sources=("sgl-project/sglang#24927", "sgl-project/sglang#35792", "NVIDIA/Model-Optimizer#1687"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Towers keep their hub names and stay unquantized; no name or exclusion holds the part of a
    wrapper (``.linear``).

    A quantized tower is a warning, and silent where the base or ``--merged-from`` has that module
    quantized already. Excluded and quantized is QC401; names under another prefix are QC201 and
    QC202.

    **Why.** Calibration wraps the tower's linears, and the wrapper's names go into the ignore list
    or the keys.
    **Hurts.** The exclusion matches nothing, the engine builds the tower quantized and finds no
    scales: a crash, or images that the model does not see.
    **Mend.** Strip the wrapper's part from names and exclusions; export the tower in the source's
    dtype.
    """
    for name, wanted in ctx.expectations.naming.wrapped:
        ctx.tally.see()
        yield ctx.finding(
            "the name holds the part of a wrapper module",
            tensor=name,
            observed=name,
            expected=wanted,
        )
    ctx.tally.see(len(ctx.candidate.declaration.exclude) if ctx.candidate.declaration else 0)
    for pattern, plain in ctx.expectations.wrapped_exclusions.items():
        yield ctx.finding(
            "the exclusion names a wrapper, and matches a module only without it",
            where=Where(
                None, ctx.candidate.declaration.file if ctx.candidate.declaration else None
            ),
            observed=pattern,
            expected=plain,
        )
    for module in ctx.candidate.modules.values():
        if role(module.name) == "vision":
            ctx.tally.see()
            if (
                module.quantized
                and module.weight is not None
                and not _excluded(ctx, module)
                and not _kept(ctx, module)
            ):
                yield ctx.finding(
                    "a module of the vision or audio tower is quantized",
                    tensor=module.weight.name,
                    observed=module.inferred_format.algo
                    if module.inferred_format
                    else module.weight.dtype,
                    expected="the source's dtype",
                    severity="warning",
                )


def _excluded(ctx: Context, module: Module) -> bool:
    return ctx.candidate.declaration is not None and ctx.candidate.declaration.exclusions.loose(
        module.name
    )


def _kept(ctx: Context, module: Module) -> bool:
    """Whether the checkpoint that this one was made from has the module quantized."""
    for source in (ctx.merged_from, ctx.base):
        theirs = source.modules.get(module.name) if source else None
        if theirs is not None and theirs.quantized:
            return True
    return False
