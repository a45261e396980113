# SPDX-License-Identifier: Apache-2.0
"""QC301: input_scale is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.inputs import required_inputs
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
    """Where a format has a stored scale of activations, every module of that format has it.

    **What it does.** Reports modules without ``input_scale`` (compressed-tensors:
    ``input_global_scale``) if the declared activations need one and other modules of the format
    have one. If none has one, the declaration is wrong (QC303).

    **Why it happens.** An expert that received no token during calibration has no amax, and the
    exporter left the key out.

    **Impact.** vLLM reads uninitialized memory as the scale: infinities, NaN or pad tokens for the
    prompts that reach the expert. SGLang uses 1.0, TensorRT-LLM stops.

    **Fix.** Write the largest input_scale of the layer's other experts, or 1.0 for all modules as a
    policy.
    """
    for required in required_inputs(ctx).values():
        ctx.tally.see(sum(r.total for r in required))
        without = [r for r in required if not r.present]
        if len(without) == len(required):
            continue  # QC303: not a gap but a different format
        for group, _, sibling in without:
            for module in group.modules:
                yield ctx.finding(
                    f"the module has no {sibling.leaves[0]}",
                    where=Where(f"{module.name}.{sibling.leaves[0]}"),
                    observed="absent",
                    expected=f"{' or '.join(sibling.dtypes)} scalar",
                )
