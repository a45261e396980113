# SPDX-License-Identifier: Apache-2.0
"""QC303: weight-only NVFP4 declared with quantized activations."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.inputs import required_inputs
from verifier.rules.registry import rule


@rule(
    "QC303",
    "weight-only NVFP4 declared with quantized activations",
    severity="error",
    depth="header",
    unit="modules",
    repairable=True,
    consumers=("vLLM", "TensorRT-LLM"),
    sources=("vllm-project/vllm#54189",),
    engines={
        "vllm": ("error", "multiplies every expert by an unset scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A checkpoint has ``input_scale`` tensors if and only if its config declares them.

    **What it does.** Compares the declared activations of each format with the scales of
    activations that are stored. A gap in some modules is QC301.

    **Why it happens.** The export ran without calibration and kept the W4A4 tag.

    **Impact.** vLLM multiplies every expert by an unset scale and repeats the same token.

    **Fix.** Set ``quant_algo`` to W4A16_NVFP4 in both configs, declare dynamic activations, or
    write input scales.
    """
    for required in required_inputs(ctx).values():
        count = sum(r.total for r in required)
        ctx.tally.see(count)
        group, fmt, sibling = required[0]
        if any(r.present for r in required) or group.declared is None:
            continue
        leaf = sibling.leaves[0]
        nvfp4 = fmt.name == "nvfp4"
        yield ctx.finding(
            "NVFP4 with quantized activations is declared, but no module has an input_scale"
            if nvfp4
            else f"{fmt.algo} with scaled activations is declared, but no module has an {leaf}",
            cause="scales missing",
            where=Where(f"{group.first.name}.{leaf}"),
            observed="0 input scales",
            expected="W4A16_NVFP4" if nvfp4 else f"{leaf}, or activations without a stored scale",
            count=count,
        )
    weight_only = [
        group
        for group in ctx.candidate.module_groups
        if group.format and group.format.name == "w4a16_nvfp4" and group.declared is not None
    ]
    ctx.tally.see(sum(len(group.modules) for group in weight_only))
    unused = [group for group in weight_only if "input_scale" in group.first.parts]
    if unused:
        yield ctx.finding(
            "weight-only NVFP4 is declared, so engines ignore the stored input scales",
            cause="scales unused",
            tensor=unused[0].first.parts["input_scale"].name,
            severity="warning",
            observed="W4A16_NVFP4",
            expected="NVFP4",
            count=sum(len(group.modules) for group in unused),
        )
