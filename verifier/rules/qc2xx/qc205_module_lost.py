# SPDX-License-Identifier: Apache-2.0
"""QC205: a tensor of the layout is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC205",
    "tensor of the layout is missing",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#876",),
    engines={
        "vllm": ("error", "starts without a word, and the parameter keeps what memory held"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor of the layout (with a base: of the base) is there, as a weight or as its
    quantized parts.

    An MTP module's tensor is QC206, a bias whose weight is here QC314.

    **Why.** The export dropped modules that it had replaced or did not recognise.
    **Hurts.** vLLM starts with the parameter uninitialised and says nothing.
    **Mend.** Copy the tensor from the source checkpoint.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    lost = ctx.expectations.naming.lost
    ctx.tally.see(len(ctx.expectations.shapes))
    if ctx.expectations.unrelated_base:
        return
    for name in lost:
        yield ctx.finding(
            "missing", where=Where(name), observed="absent", expected=_shape(ctx, name)
        )


def _shape(ctx: Context, name: str) -> str:
    shape = ctx.expectations.shapes.get(name)
    return str(list(shape)) if shape else "present"
