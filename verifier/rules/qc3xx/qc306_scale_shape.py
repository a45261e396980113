# SPDX-License-Identifier: Apache-2.0
"""QC306: a scale has another shape than its weight needs."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import runtime_layout


@rule(
    "QC306",
    "scale has another shape",
    severity="error",
    depth="header",
    unit="scale tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#2038",),
    engines={
        "vllm": ("error", "narrows in experts and leaves the rest unwritten; stops elsewhere"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A block scale is [out, in/block] of its weight's logical width; the others are scalars.

    The padded and swizzled layouts of kernels are QC307's.

    **Why.** Scales computed from the packed bytes have half the columns; a column went missing.
    **Hurts.** For experts vLLM narrows and leaves the rest unwritten, silently.
    **Mend.** Write the scale in the linear layout, computed from the unpacked weight.
    """
    for module, found, sibling, tensor in ctx.candidate.scales:
        ctx.tally.see()
        out, in_ = module.dims or (0, 0)
        wanted = sibling.shapes(out, in_)
        if tensor.shape in wanted:
            continue
        declared = ctx.candidate.declared_group_size(module, found)
        if declared and declared != found.group_size and tensor.shape == (out, in_ // declared):
            continue  # QC308: scales that follow a wrong declaration
        if tensor is module.scale and found.rowwise and runtime_layout(tensor.shape, *wanted[0]):
            continue  # QC307
        yield ctx.finding(
            f"{found.algo}: {tensor.name.rpartition('.')[2]} does not fit its weight of [{out}, {in_}]",
            tensor=tensor.name,
            observed=list(tensor.shape),
            expected=list(wanted[0]),
        )
