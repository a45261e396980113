# SPDX-License-Identifier: Apache-2.0
"""QC402: an unquantized linear that no exclusion covers."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.mtp import mtp_modules
from verifier.rules.registry import rule


@rule(
    "QC402",
    "unquantized module is not excluded",
    severity="error",
    depth="header",
    unit="unquantized linears",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1858", "vllm-project/vllm#52501"),
    engines={
        "vllm": ("error", "builds a packed parameter: a size error, or NaN after the load"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """In a checkpoint of one format, every linear that is not quantized is named by an exclusion.

    **Why.** Routers are no nn.Linear in transformers 5 and are forgotten; patterns are in another
    namespace.
    **Hurts.** The engine builds a packed parameter for it: a size error, or a NaN sentinel after
    the load.
    **Mend.** List the full hub name of every unquantized linear. Under MIXED_PRECISION a module
    without an entry is unquantized by definition, and the rule does not apply. (MTP heads are
    QC403; what only some engines read as excluded, QC405.)
    """
    declaration = ctx.candidate.declaration
    if declaration is None or declaration.mixed or declaration.algo is None:
        return
    mtp = mtp_modules(ctx)
    for module in ctx.candidate.linears:
        if module.quantized or module.name in mtp:  # the MTP head is QC403's
            continue
        ctx.tally.see()
        weight = module.weight
        if not declaration.exclusions.loose(module.name) and weight is not None:
            yield ctx.finding(
                f"{weight.dtype}, and no exclusion covers it: engines expect {declaration.algo} here",
                where=Where(weight.name, weight.file),
                observed=weight.dtype,
                expected="an exclusion, or scales",
            )
