# SPDX-License-Identifier: Apache-2.0
"""QC308: the declared group size is not the format's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC308",
    "declared group size is wrong",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1552",),
    engines={
        "vllm": ("error", "sizes the scales by it and stops"),
        "trtllm": ("error", "stops: it asserts 16 for NVFP4 and 32 for MXFP8"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The declared ``group_size`` is the format's block width, 16 for NVFP4 and 32 for MXFP8, as on
    disk.

    **Why.** The recipe's block size and the config's are set in two places.
    **Hurts.** Engines size the scale parameter from the config: a size error, or for experts a
    silent partial load.
    **Mend.** State the size that was used; no engine serves NVFP4 with another than 16, or MXFP8
    with another than 32.
    """
    for alike in ctx.candidate.module_groups:
        first, found = alike.first, alike.format
        if found is None or found.group_size is None or first.scale is None or first.dims is None:
            continue
        ctx.tally.see(len(alike.modules))
        declared = ctx.candidate.declared_group_size(first, found)
        if declared == found.group_size:
            continue
        width = first.scale.shape[-1] if first.scale.shape else 0
        shown = f"{first.dims[1] // width}" if width else "none"
        for scale in (m.scale for m in alike.modules if m.scale is not None):
            yield ctx.finding(
                f"{found.algo} is declared with group_size {declared}; the scales on disk are for {shown}",
                where=Where(scale.name, scale.file),
                observed=declared,
                expected=found.group_size,
            )
