# SPDX-License-Identifier: Apache-2.0
"""QC307: scale is padded or swizzled."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.alike import each_quantized
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
    for group in ctx.candidate.module_groups:
        fmt = group.format or _undeclared_format(ctx, group.first)
        if fmt is not None and _rows_and_columns(group.first, fmt) is not None:
            ctx.tally.see(len(group.modules))
    yield from each_quantized(ctx, _of_known_format)
    yield from each_quantized(ctx, _of_undeclared_format)


def _of_known_format(ctx: Context, module: Module) -> Iterator[Finding]:
    yield from _check_module(ctx, module, ctx.candidate.format_of(module))


def _of_undeclared_format(ctx: Context, module: Module) -> Iterator[Finding]:
    yield from _check_module(ctx, module, _undeclared_format(ctx, module))


def _check_module(ctx: Context, module: Module, fmt: Format | None) -> Iterator[Finding]:
    """Yield a block scale that has a layout of kernels."""
    sizes, scale = _rows_and_columns(module, fmt) if fmt else None, module.scale
    if fmt is None or sizes is None or scale is None:
        return
    layout = runtime_layout(scale.shape, *sizes)
    if layout:
        yield ctx.finding(
            f"{fmt.algo}: the block scale is {layout}, as kernels expect it at run time",
            tensor=scale.name,
            observed=list(scale.shape),
            expected=list(sizes),
        )


def _rows_and_columns(module: Module, fmt: Format) -> tuple[int, int] | None:
    """Return the shape of the block scale that a module has under a format; None where it has none
    or the format has no blocks of a row.
    """
    if module.scale is None or module.dims is None or not fmt.rowwise or not fmt.group_size:
        return None
    return module.dims[0], -(-module.dims[1] // fmt.group_size)


def _undeclared_format(ctx: Context, module: Module) -> Format | None:
    """Return MXFP8 for a module that is MXFP8 by its dtypes, where nothing is declared: a wrong
    shape hides its format then.
    """
    declared, weight, scale = ctx.candidate.declared_for(module), module.weight, module.scale
    if (declared is not None and declared.algo is not None) or module.inferred_format is not None:
        return None
    if weight is None or scale is None or weight.dtype != "F8_E4M3":
        return None
    return FORMATS["mxfp8"] if scale.dtype in ("U8", "F8_E8M0") else None
