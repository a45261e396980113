# SPDX-License-Identifier: Apache-2.0
"""QC301: input_scale is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC301",
    "input_scale is missing",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#45212", "vllm-project/vllm#45320", "vllm-project/vllm#54189"),
    engines={
        "vllm": ("error", "reads uninitialized memory as the scale"),
        "sglang": ("warning", "takes 1.0 as the scale"),
        "trtllm": ("error", "stops in its linear layers, which need the scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """If NVFP4 with quantized activations is declared, every NVFP4 module has an ``input_scale``.

    **What it does.** Reports NVFP4 modules without ``input_scale`` if other NVFP4 modules have one.
    If none has one, the declaration is wrong (QC303).

    **Why it happens.** An expert that received no token during calibration has no amax, and the
    exporter left the key out.

    **Impact.** vLLM reads uninitialized memory as the scale: infinities, NaN or pad tokens for the
    prompts that reach the expert. SGLang uses 1.0, TensorRT-LLM stops.

    **Fix.** Write the largest input_scale of the layer's other experts, or 1.0 for all modules as a
    policy.
    """
    modules = [m for m, fmt in ctx.candidate.formatted if fmt.name == "nvfp4"]
    without = [m for m in modules if "input_scale" not in m.parts]
    ctx.tally.see(len(modules))
    if len(without) == len(modules):
        return  # QC303: not a gap but a different format
    for module in without:
        yield ctx.finding(
            "the module has no input_scale",
            where=Where(f"{module.name}.input_scale"),
            observed="absent",
            expected="F32 scalar",
        )
