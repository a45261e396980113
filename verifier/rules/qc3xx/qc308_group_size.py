# SPDX-License-Identifier: Apache-2.0
"""QC308: declared group size is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format


@rule(
    "QC308",
    "declared group size is wrong",
    severity="error",
    depth="header",
    unit="modules",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1552",),
    engines={
        "vllm": ("error", "sizes the scales from it and stops"),
        "trtllm": ("error", "stops: it asserts 16 for NVFP4 and 32 for MXFP8"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The declared ``group_size`` is the block size of the format: 16 for NVFP4, 32 for MXFP8.

    **What it does.** Compares the declared ``group_size`` or tile of each quantized module with its
    format and with the scales on disk.

    **Why it happens.** The recipe's block size and the config's are set in two places.

    **Impact.** Engines size the scale parameter from the config: a size error, or for experts a
    silent partial load.

    **Fix.** Declare the size that was used. No engine serves NVFP4 with a size other than 16, or
    MXFP8 with one other than 32.
    """
    for group in ctx.candidate.module_groups:
        first, fmt = group.first, group.format
        if fmt is None or fmt.group_size is None or first.scale is None or first.dims is None:
            continue
        ctx.tally.see(len(group.modules))
        yield from _other_tiles(ctx, group, fmt)
        declared = ctx.candidate.declared_group_size(first, fmt)
        if declared == fmt.group_size:
            continue
        columns = first.scale.shape[-1] if first.scale.shape and fmt.rowwise else 0
        stored = f"; the stored scales are for {first.dims[1] // columns}" if columns else ""
        for scale in (m.scale for m in group.modules if m.scale is not None):
            yield ctx.finding(
                f"{fmt.algo} is declared with group_size {declared}{stored}",
                cause="group size",
                where=Where(scale.name, scale.file),
                observed=declared,
                expected=fmt.group_size,
            )


def _other_tiles(ctx: Context, group: ModuleGroup, fmt: Format) -> Iterator[Finding]:
    """Yield modules whose scales are of other tiles than declared; columns alone are a group size
    that the config states.
    """
    declared = group.declared.format if group.declared is not None else None
    if declared is None or declared.layout != fmt.layout or None in (declared.block, fmt.block):
        return
    if declared.block == fmt.block or (group.declared and group.declared.group_size):
        return
    for scale in (m.scale for m in group.modules if m.scale is not None):
        yield ctx.finding(
            f"{fmt.algo} is declared with other tiles than the stored scales have",
            cause="tiles",
            where=Where(scale.name, scale.file),
            observed=list(declared.block or ()),
            expected=list(fmt.block or ()),
        )
