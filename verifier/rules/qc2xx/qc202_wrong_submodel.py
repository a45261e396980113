# SPDX-License-Identifier: Apache-2.0
"""QC202: names under the prefix of another part of the model."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC202",
    "prefix of another part of the model",
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
    """Each part of a composite model keeps its own prefix: no text layer under ``visual``, no tower
    under the text's.

    **Why.** A renaming rule meant for one part (its ``scope_prefix``) was applied to all keys, or
    to another part's.
    **Hurts.** vLLM raises ValueError; loaders that skip what they don't know leave that part
    unwritten.
    **Mend.** Apply each renaming within its own part only. (In-memory names, and a wrong prefix
    within the right part, are QC201.)
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    if ctx.expectations.unrelated_base:
        return
    for name, wanted in ctx.expectations.naming.submodel:
        yield ctx.finding(
            "the name has the prefix of another part of the model",
            tensor=name,
            observed=name,
            expected=wanted,
        )
