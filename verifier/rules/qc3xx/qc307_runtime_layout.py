# SPDX-License-Identifier: Apache-2.0
"""QC307: a block scale in the layout of a kernel instead of the file's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FORMATS, Format, Module, runtime_layout


@rule(
    "QC307",
    "scale is padded or swizzled",
    severity="error",
    depth="header",
    unit="block scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1195",),
    engines={
        "vllm": (
            "error",
            '"start + length exceeds dimension size", seen on vLLM 0.32 with swizzled scales',
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A block scale is stored [out, in/block], row by row: not padded to 128 rows or 4 columns, not
    in 128x4 tiles.

    Any other wrong shape is QC306. Where out divides by 128 and in/block by 4, a swizzled scale has
    the right shape and a header cannot tell it.

    **Why.** The exporter saved what a kernel wants at run time (cuBLAS and CUTLASS read 128x4
    tiles), as ModelOpt's diffusion exporter may do on purpose.
    **Hurts.** Engines swizzle the scale themselves when they load it: a size error at best.
    **Mend.** Write the scale before the exporter's padding and swizzle, or undo them; no value is
    lost.
    """
    for module, found in (*ctx.candidate.formatted, *_undeclared(ctx)):
        scale = module.scale
        if scale is None or module.dims is None or not found.rowwise or not found.group_size:
            continue
        ctx.tally.see()
        rows, columns = module.dims[0], -(-module.dims[1] // found.group_size)
        how = runtime_layout(scale.shape, rows, columns)
        if how:
            yield ctx.finding(
                f"{found.algo}: the block scale is {how}, a layout of kernels",
                tensor=scale.name,
                observed=list(scale.shape),
                expected=[rows, columns],
            )


def _undeclared(ctx: Context) -> Iterator[tuple[Module, Format]]:
    """Yield modules that dtypes alone show to be MXFP8; without a declaration a wrong shape hides
    their format.
    """
    if ctx.candidate.declaration is not None:
        return
    for module in ctx.candidate.quantized_modules:
        if (
            module.inferred_format is None
            and module.weight is not None
            and module.scale is not None
        ):
            if module.weight.dtype == "F8_E4M3" and module.scale.dtype in ("U8", "F8_E8M0"):
                yield module, FORMATS["mxfp8"]
