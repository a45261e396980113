# SPDX-License-Identifier: Apache-2.0
"""QC307: scale is padded or swizzled."""

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
    """A block scale is stored as [out, in/block], row by row, without padding or swizzling.

    **What it does.** Recognizes shapes that are padded to 128 rows or 4 columns, or arranged in
    128x4 tiles. Any other wrong shape is QC306. Where out is divisible by 128 and in/block by 4, a
    swizzled scale has the right shape and cannot be recognized from the header.

    **Why it happens.** The exporter saved the layout that a kernel needs at run time (cuBLAS and
    CUTLASS read 128x4 tiles), as ModelOpt's diffusion exporter may do intentionally.

    **Impact.** Engines swizzle the scale themselves when they load it: at best a size error.

    **Fix.** Write the scale before padding and swizzling, or undo them; no value is lost.
    """
    for module, fmt in (*ctx.candidate.formatted, *_undeclared(ctx)):
        scale = module.scale
        if scale is None or module.dims is None or not fmt.rowwise or not fmt.group_size:
            continue
        ctx.tally.see()
        rows, columns = module.dims[0], -(-module.dims[1] // fmt.group_size)
        layout = runtime_layout(scale.shape, rows, columns)
        if layout:
            yield ctx.finding(
                f"{fmt.algo}: the block scale is {layout}, as kernels expect it at run time",
                tensor=scale.name,
                observed=list(scale.shape),
                expected=[rows, columns],
            )


def _undeclared(ctx: Context) -> Iterator[tuple[Module, Format]]:
    """Yield the modules that are MXFP8 by their dtypes.

    Without a declaration, a wrong shape hides their format.
    """
    for module in ctx.candidate.quantized_modules:
        declared = ctx.candidate.declared_for(module)
        if declared is not None and declared.algo is not None:
            continue
        weight, scale = module.weight, module.scale
        if module.inferred_format is None and weight is not None and scale is not None:
            if weight.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0"):
                yield module, FORMATS["mxfp8"]
