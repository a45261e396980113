# SPDX-License-Identifier: Apache-2.0
"""QC303: weight-only NVFP4 declared with quantized activations."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module


@rule(
    "QC303",
    "weight-only NVFP4 declared with quantized activations",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "TensorRT-LLM"),
    sources=("vllm-project/vllm#54189",),
    engines={
        "vllm": ("error", "multiplies every expert by an unset scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A checkpoint without any ``input_scale`` declares W4A16_NVFP4; one with them declares NVFP4.

    **What it does.** Compares the declared format of the NVFP4 modules with the input scales that
    are stored.

    **Why it happens.** The export ran without calibration and kept the W4A4 tag.

    **Impact.** vLLM multiplies every expert by an unset scale and repeats the same token.

    **Fix.** Set ``quant_algo`` to W4A16_NVFP4 in both configs, or write input scales.
    """
    modules = _declared(ctx, "nvfp4")
    ctx.tally.see(len(modules))
    if modules and not any("input_scale" in m.parts for m in modules):
        yield ctx.finding(
            "NVFP4 with quantized activations is declared, but no module has an input_scale",
            where=Where(f"{modules[0].name}.input_scale"),
            observed="0 input scales",
            expected="W4A16_NVFP4",
            count=len(modules),
        )
    weight_only = _declared(ctx, "w4a16_nvfp4")
    ctx.tally.see(len(weight_only))
    unused = [m.parts["input_scale"].name for m in weight_only if "input_scale" in m.parts]
    if unused:
        yield ctx.finding(
            "weight-only NVFP4 is declared, so engines ignore the stored input scales",
            tensor=unused[0],
            severity="warning",
            observed="W4A16_NVFP4",
            expected="NVFP4",
            count=len(unused),
        )


def _declared(ctx: Context, name: str) -> list[Module]:
    """Return the modules of one format that the declaration states a format for."""
    candidate = ctx.candidate
    modules = [m for m, fmt in candidate.formatted if fmt.name == name]
    return [m for m in modules if candidate.declared_for(m) is not None]
