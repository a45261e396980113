# SPDX-License-Identifier: Apache-2.0
"""QC305: weight is not packed."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS


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
    for module in ctx.candidate.quantized_modules:
        declaration = ctx.candidate.declared_for(module)
        declared = declaration.format if declaration else None
        if declared is None or not declared.packed or module.weight is None:
            continue
        ctx.tally.see()
        if module.weight.dtype not in (*declared.weight.dtypes, *FLOATS):
            yield ctx.finding(
                f"declared {declared.algo}, but the weight is {module.weight.dtype}",
                tensor=module.weight.name,
                observed=f"{module.weight.dtype} {list(module.weight.shape)}",
                expected="U8 [out, in/2]",
            )
