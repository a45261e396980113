# SPDX-License-Identifier: Apache-2.0
"""QC306: scale has the wrong shape."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.alike import each_quantized
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, runtime_layout


@rule(
    "QC306",
    "scale has the wrong shape",
    severity="error",
    depth="header",
    unit="scale tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#2038",),
    engines={
        "vllm": ("error", "narrows in experts and leaves the rest uninitialized; stops elsewhere"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A block scale has the shape [out, in/block] of its weight; the other scales are scalars.

    **What it does.** Compares the shape of each scale tensor with the logical shape of its weight.
    The padded and swizzled layouts of kernels are QC307.

    **Why it happens.** Scales that were computed from the packed bytes have half the columns, or a
    column is missing.

    **Impact.** For experts, vLLM silently narrows and leaves the rest uninitialized.

    **Fix.** Write the scale in the linear layout, computed from the unpacked weight.
    """
    for group in ctx.candidate.module_groups:
        ctx.tally.see(len(group.modules) * len(ctx.candidate.siblings(group.first)))
    yield from each_quantized(ctx, _check_module)


def _check_module(ctx: Context, module: Module) -> Iterator[Finding]:
    """Yield the scales of a module that do not fit its weight."""
    fmt = ctx.candidate.format_of(module)
    if fmt is None:
        return
    out, in_ = module.dims or (0, 0)
    for leaf, sibling in ctx.candidate.siblings(module):
        tensor, shapes = module.parts[leaf], sibling.shapes(out, in_)
        if tensor.shape in shapes:
            continue
        declared = ctx.candidate.declared_group_size(module, fmt)
        if declared and declared != fmt.group_size and tensor.shape == (out, in_ // declared):
            continue  # QC308: scales that follow a wrong declaration
        if tensor is module.scale and fmt.rowwise and runtime_layout(tensor.shape, *shapes[0]):
            continue  # QC307
        yield ctx.finding(
            f"{fmt.algo}: {tensor.name.rpartition('.')[2]} does not fit its weight of shape "
            f"[{out}, {in_}]",
            tensor=tensor.name,
            observed=list(tensor.shape),
            expected=list(shapes[0]),
        )
