# SPDX-License-Identifier: Apache-2.0
"""QC205: missing tensor."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.expectations import stored_name
from verifier.rules.registry import rule


@rule(
    "QC205",
    "missing tensor",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#876",),
    engines={
        "vllm": (
            "error",
            "starts silently with the parameter uninitialized; stops at a scale of a linear layer",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor of the layout is stored, as a weight or as its quantized parts.

    **What it does.** Compares the stored names with the layout of the family; with a base, with the
    names of the base. Missing tensors of an MTP module are QC206, of a routed expert QC207; a
    missing bias of a stored weight is QC314.

    **Why it happens.** The export dropped modules that it had replaced or did not recognize.

    **Impact.** vLLM starts silently with the parameter uninitialized.

    **Fix.** Copy the tensor from the source checkpoint.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.expectations.shapes))
    if ctx.expectations.unrelated_base:
        return
    for name in ctx.expectations.naming.lost:
        yield ctx.finding(
            "missing tensor",
            where=Where(stored_name(ctx.candidate, name)),
            observed="absent",
            expected=_shape(ctx, name),
        )


def _shape(ctx: Context, name: str) -> str:
    shape = ctx.expectations.shapes.get(name)
    return str(list(shape)) if shape else "present"
