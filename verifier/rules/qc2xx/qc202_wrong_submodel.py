# SPDX-License-Identifier: Apache-2.0
"""QC202: prefix of a different submodel."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC202",
    "prefix of a different submodel",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#2076", "NVIDIA/Model-Optimizer#2032"),
    engines={
        "vllm": (
            "error",
            'raises "There is no module or parameter named" (NVIDIA/Model-Optimizer#2076)',
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each submodel of a composite model keeps its own prefix.

    **What it does.** Reports a text layer under ``visual``, a tower under the prefix of the text
    model, and the like. transformers' module names, and a wrong prefix within the right submodel,
    are QC201.

    **Why it happens.** A renaming rule for one submodel (its ``scope_prefix``) was applied to all
    keys, or to those of a different submodel.

    **Impact.** vLLM raises ValueError; loaders that skip unknown names leave that submodel
    uninitialized.

    **Fix.** Apply each renaming only within its own submodel.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    if ctx.expectations.unrelated_base:
        return
    for name, expected_name in ctx.expectations.naming.submodel:
        yield ctx.finding(
            "the name has the prefix of a different submodel",
            tensor=name,
            observed=name,
            expected=expected_name,
        )
