# SPDX-License-Identifier: Apache-2.0
"""QC306: a scale has another shape than its weight needs."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC306", "scale has another shape", severity="error", depth="header", unit="scale tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#2038", "NVIDIA/Model-Optimizer#1195"),
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """A block scale is [out, in/block] of its weight's logical width, unpadded and not swizzled; the others are scalars.

    **Why.** Scales computed from the packed bytes have half the columns; a runtime layout is padded to 128 rows; a
    column went missing.
    **Hurts.** For experts vLLM narrows and leaves the rest unwritten, silently.
    **Mend.** Write the scale in the linear layout, computed from the unpacked weight.
    """
    for alike in ctx.alike:
        first, found = alike.first, alike.format
        if found is None:
            continue
        out, in_ = first.dims or (0, 0)
        declared = ctx.declared_group(first, found)
        for leaf in first.scales:
            sibling = found.sibling(leaf)
            if sibling is None:
                continue
            ctx.tally.see(len(alike.modules))
            shape, wanted = first.parts[leaf].shape, sibling.shapes(out, in_)
            follows = declared != found.group_size and declared and shape == (out, in_ // declared)
            if shape in wanted or follows:  # QC308 speaks of scales that follow a wrong declaration
                continue
            for module in alike.modules:
                tensor = module.parts[leaf]
                yield ctx.finding(
                    f"{found.algo}: {leaf} does not fit its weight of [{out}, {in_}]", tensor=tensor.name,
                    observed=list(tensor.shape), expected=list(wanted[0]),
                )  # fmt: skip
