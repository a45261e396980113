# SPDX-License-Identifier: Apache-2.0
"""QC303: a weight-only checkpoint declared as W4A4."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC303",
    "weight-only NVFP4 declared with activations",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "TensorRT-LLM"),
    sources=("vllm-project/vllm#54189",),
    engines={
        "vllm": ("error", "multiplies every expert by a scale that was never set"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A checkpoint without any ``input_scale`` declares W4A16_NVFP4, not NVFP4, and one with them
    the reverse.

    **Why.** The export ran without calibration and kept the W4A4 tag.
    **Hurts.** vLLM multiplies every expert by an unset scale: the same token again and again.
    **Mend.** Set ``quant_algo`` to W4A16_NVFP4 in both configs, or write input scales.
    """
    modules = [
        m
        for m, f in ctx.candidate.formatted
        if f.name == "nvfp4" and ctx.candidate.declared_for(m) is not None
    ]
    ctx.tally.see(len(modules))
    if modules and not any("input_scale" in m.parts for m in modules):
        yield ctx.finding(
            "NVFP4 with quantized activations is declared and no module has an input_scale",
            where=Where(f"{modules[0].name}.input_scale"),
            observed="0 input scales",
            expected="W4A16_NVFP4",
            count=len(modules),
        )
    only = [
        m
        for m, f in ctx.candidate.formatted
        if f.name == "w4a16_nvfp4" and ctx.candidate.declared_for(m) is not None
    ]
    ctx.tally.see(len(only))
    scaled = [m.parts["input_scale"].name for m in only if "input_scale" in m.parts]
    if scaled:
        yield ctx.finding(
            "weight-only NVFP4 is declared and input scales are stored, which no engine then reads",
            tensor=scaled[0],
            severity="warning",
            observed="W4A16_NVFP4",
            expected="NVFP4",
            count=len(scaled),
        )
