# SPDX-License-Identifier: Apache-2.0
"""QC305: weight is not packed."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.alike import each_quantized
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, Format, Module


@rule(
    "QC305",
    "weight is not packed",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#868",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A module declared NVFP4 stores two values per byte: U8 [out, in/2].

    **What it does.** Compares the weight's dtype with the declared format. Scales next to an
    unquantized weight are QC313.

    **Why it happens.** The packing was lost when the state dict was written; the file is larger
    than its label says.

    **Impact.** A size error, or packed values that are read as something else.

    **Fix.** Export again, and check that the weight leaves the exporter as uint8.
    """
    for group in ctx.candidate.module_groups:
        if _declared_packed(ctx, group.first):
            ctx.tally.see(len(group.modules))
    yield from each_quantized(ctx, _check_module)


def _declared_packed(ctx: Context, module: Module) -> Format | None:
    """Return the packed format that is declared for a weight, None for none."""
    declaration = ctx.candidate.declared_for(module)
    declared = declaration.format if declaration else None
    stored = module.weight is not None
    return declared if stored and declared is not None and declared.packed else None


def _check_module(ctx: Context, module: Module) -> Iterator[Finding]:
    """Yield a weight whose values are not packed."""
    declared, weight = _declared_packed(ctx, module), module.weight
    if declared is None or weight is None:
        return
    if weight.dtype not in (*declared.weight.dtypes, *FLOATS):
        yield ctx.finding(
            f"declared {declared.algo}, but the weight is {weight.dtype}",
            tensor=weight.name,
            observed=f"{weight.dtype} {list(weight.shape)}",
            expected="U8 [out, in/2]",
        )
