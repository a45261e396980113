# SPDX-License-Identifier: Apache-2.0
"""QC208: a weight has another shape than the layout gives it."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC208",
    "weight has another shape",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#50610", "NVIDIA/Model-Optimizer#858"),
    engines={
        "vllm": (
            "error",
            "stops at the shape, or narrows and leaves part of the parameter unwritten",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each weight has the shape that config (with a base: the base) gives it; packed NVFP4 counts
    two codes a byte.

    **Why.** A batched-matmul expert was written transposed; a width was halved twice; config and
    weights are of different models.
    **Hurts.** A size error at best; where a loader narrows, part of the parameter stays unwritten.
    **Mend.** Write the tensor as [out, in], packed along ``in``.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    if ctx.expectations.unrelated_base:
        return
    known = [
        (n, s, w)
        for n, s in ctx.candidate.shapes.items()
        if s is not None and (w := ctx.expectations.shapes.get(n)) is not None
    ]
    ctx.tally.see(len(known))
    for name, found, wanted in sorted(k for k in known if k[1] != k[2]):
        turned = " (transposed)" if len(found) == 2 and found == wanted[::-1] else ""
        yield ctx.finding(
            f"has another logical shape{turned}",
            tensor=name if name in ctx.checkpoint.tensors else None,
            observed=list(found),
            expected=list(wanted),
        )
