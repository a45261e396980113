# SPDX-License-Identifier: Apache-2.0
"""QC301: some W4A4 modules have no input_scale."""

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
        "vllm": ("error", "reads uninitialised memory as the scale"),
        "sglang": ("warning", "takes 1.0 as the scale"),
        "trtllm": ("error", "stops in its linear layers, which need the scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Where a checkpoint declares NVFP4 with quantized activations, every NVFP4 module carries
    ``input_scale``.

    **Why.** An expert that calibration never routed a token to has no amax, and the exporter left
    the key out.
    **Hurts.** vLLM reads uninitialised memory: 1/0, NaN or pad tokens for the prompts that reach
    the expert. SGLang takes 1.0. TensorRT-LLM stops.
    **Mend.** Write the largest input_scale of the layer's other experts, or 1.0 for all by policy.
    """
    modules = [m for m, f in ctx.candidate.formatted if f.name == "nvfp4"]
    without = [m for m in modules if "input_scale" not in m.parts]
    ctx.tally.see(len(modules))
    if len(without) == len(modules):
        return  # QC303: not a hole but another format
    for module in without:
        yield ctx.finding(
            "the module has no input_scale",
            where=Where(f"{module.name}.input_scale"),
            observed="absent",
            expected="F32 scalar",
        )
