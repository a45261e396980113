# SPDX-License-Identifier: Apache-2.0
"""QC302: a weight scale is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC302",
    "weight scale is missing",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#54444", "charlie12345/ROCmFPX#85"),
    engines={
        "vllm": ("error", "folds uninitialised memory into the product"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each quantized weight has all weight scales of its format (NVFP4: ``weight_scale`` and
    ``weight_scale_2``).

    **Why.** An exporter or merger dropped scalars, or a filter on "weight" did.
    **Hurts.** vLLM folds arbitrary memory into the product, without a word.
    **Mend.** Take the scale from the exporter's state; it cannot be recovered from the codes.
    """
    for alike in ctx.candidate.module_groups:
        module, found = alike.first, alike.format
        if found is None:
            if (
                module.weight is not None
                and module.weight.dtype == "F8_E4M3"
                and not module.scale
                and module.dims
            ):
                ctx.tally.see(len(alike.modules))
                yield from _missing(ctx, alike, "weight_scale", "a scale")
            continue
        ctx.tally.see(len(alike.modules))
        for sibling in found.siblings:
            leaf = sibling.leaves[0]
            if (
                leaf != "input_scale"
                and sibling.required
                and not any(n in module.parts for n in sibling.leaves)
            ):
                yield from _missing(
                    ctx, alike, leaf, f"{' or '.join(sibling.dtypes)} for {found.algo}"
                )


def _missing(ctx: Context, alike: ModuleGroup, leaf: str, expected: str) -> Iterator[Finding]:
    for module in alike.modules:
        yield ctx.finding(
            f"a quantized weight has no {leaf}",
            where=Where(f"{module.name}.{leaf}"),
            observed="absent",
            expected=expected,
        )
