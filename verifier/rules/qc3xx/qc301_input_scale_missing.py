# SPDX-License-Identifier: Apache-2.0
"""QC301: input_scale is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, Sibling, required_siblings


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
    kinds: dict[str, list[tuple[Module, Sibling]]] = {}
    for group in ctx.candidate.module_groups:
        sibling = _required_input(group)
        if sibling is not None and group.format is not None:
            pairs = kinds.setdefault(group.format.name, [])
            pairs += ((module, sibling) for module in group.modules)
    for pairs in kinds.values():
        ctx.tally.see(len(pairs))
        without = [(m, s) for m, s in pairs if not any(leaf in m.parts for leaf in s.leaves)]
        if len(without) == len(pairs):
            continue  # QC303: not a gap but a different format
        for module, sibling in without:
            yield ctx.finding(
                f"the module has no {sibling.leaves[0]}",
                where=Where(f"{module.name}.{sibling.leaves[0]}"),
                observed="absent",
                expected=f"{' or '.join(sibling.dtypes)} scalar",
            )


def _required_input(group: ModuleGroup) -> Sibling | None:
    """Return the scale of activations that a group of modules has to have; None for none."""
    if group.format is None:
        return None
    scheme = group.declared.scheme if group.declared else None
    required = required_siblings(group.format, scheme)
    return next((s for s in required if s.role == "input"), None)
