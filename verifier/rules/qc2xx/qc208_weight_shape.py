# SPDX-License-Identifier: Apache-2.0
"""QC208: weight has the wrong shape."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC208",
    "weight has the wrong shape",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#50610", "NVIDIA/Model-Optimizer#858"),
    engines={
        "vllm": (
            "error",
            "stops at the shape, or narrows and leaves part of the parameter uninitialized",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each weight has the shape that the config (with a base: the base) gives it.

    **What it does.** Compares logical shapes: a packed NVFP4 weight counts two values per byte.

    **Why it happens.** A batched-matmul expert was written transposed, a width was halved twice, or
    config and weights belong to different models.

    **Impact.** At best a size error; where a loader narrows, part of the parameter stays
    uninitialized.

    **Fix.** Write the tensor as [out, in], packed along ``in``.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    if ctx.expectations.unrelated_base:
        return
    expected_shapes = ctx.expectations.shapes
    wrong = []
    for name, shape in ctx.candidate.shapes.items():
        expected = expected_shapes.get(name)
        if shape is not None and expected is not None:
            ctx.tally.see()
            if shape != expected:
                wrong.append((name, shape, expected))
    for name, shape, expected in sorted(wrong):
        transposed = len(shape) == 2 and shape == expected[::-1]
        yield ctx.finding(
            "wrong shape (transposed)" if transposed else "wrong shape",
            tensor=_stored(ctx, name),
            observed=list(shape),
            expected=list(expected),
        )


def _stored(ctx: Context, name: str) -> str | None:
    """Return the stored tensor that an unquantized name stands for."""
    if name in ctx.checkpoint.tensors:
        return name
    module = ctx.candidate.modules.get(name.removesuffix(".weight"))
    return module.weight.name if module is not None and module.weight is not None else None
