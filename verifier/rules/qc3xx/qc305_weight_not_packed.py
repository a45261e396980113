# SPDX-License-Identifier: Apache-2.0
"""QC305: NVFP4 is declared and the weight is not packed."""

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
    """A module declared NVFP4 stores two codes a byte: U8 [out, in/2]. Scales beside plain values
    are QC313.

    **Why.** The packing got lost when the state dict was written; the file is larger than its label
    says.
    **Hurts.** A size error, or codes read as something else.
    **Mend.** Export again; check that the weight leaves the exporter as uint8.
    """
    for module in ctx.candidate.quantized_modules:
        cover = ctx.candidate.declared_for(module)
        declared = cover.format if cover else None
        if declared is None or not declared.packed or module.weight is None:
            continue
        ctx.tally.see()
        if module.weight.dtype != declared.weight_dtype and module.weight.dtype not in FLOATS:
            yield ctx.finding(
                f"declared {declared.algo}, and the weight is {module.weight.dtype}",
                tensor=module.weight.name,
                observed=f"{module.weight.dtype} {list(module.weight.shape)}",
                expected="U8 [out, in/2]",
            )
