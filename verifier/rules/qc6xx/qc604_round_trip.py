# SPDX-License-Identifier: Apache-2.0
"""QC604: fused parameters do not round-trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Severity, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.fusing import Fused, changed_values, fused
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, SCALE_LEAVES, Format, Module, expert_key, same_layout

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Config keys for the number of routed experts of a layer."""


_SPLIT_BLOCK: Mapping[str, tuple[Severity, str]] = {
    "vllm": ("error", "raises ValueError when it builds the layer (validate_fp8_block_shape)"),
    "sglang": ("error", "raises ValueError when it builds the layer (validate_fp8_block_shape)"),
}


@rule(
    "QC604",
    "fused parameters do not round-trip",
    severity="error",
    depth="payload",
    unit="fused parameters",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=(
        "NVIDIA/Model-Optimizer#1833",
        "vLLM validate_fp8_block_shape",
        "vLLM 0.32 loaders, run on the CPU",
    ),
    engines={
        "vllm": (
            "error",
            "copies each part into its range with a cast; overlapping ranges are overwritten",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """What loaders combine into one parameter (q/k/v, gate/up, experts) splits into the same bytes.

    **What it does.** Checks that the parts of a fused parameter have one width and one dtype,
    scales included, and that their scales use one spelling of the shape; that rows which share a
    scale (128x128 blocks) are in one part; and that a ``pre_quant_scale``, which belongs to the
    common input, is the same in all parts. The experts of a layer must be numbered from 0 without a
    gap, and have one format and shape. Bytes are read only where names, dtypes and shapes leave
    room for a difference.

    Different formats within q/k/v or gate/up are QC409, different global and input scales QC504 to
    QC506, scales that do not fit their own weight QC304 and QC306; differences from a known layout
    or a base are QC205 to QC208 and QC516.

    **Why it happens.** Parts were written by different passes, an unfused tensor was split where
    its format cannot be split, or the scales of a common input were smoothed for each projection
    separately.

    **Impact.** vLLM and transformers cast silently (E8M0 into U8 becomes 0, which is 2^-127), stop
    at a boundary inside a block, or keep one of the scales, so every other part is wrong by the
    ratio.

    **Fix.** Write all parts of a group in one pass; leave a projection unquantized if its rows are
    not divisible by the block size.
    """
    mixed: set[str] = set()  # members of fused groups of several formats: QC409
    groups = list(fused(ctx))
    for group in groups:
        ctx.tally.see()
        check_group = _check_experts if group.stack else _check_projections
        yield from check_group(ctx, group, mixed)
    if ctx.expectations.why_unknown:  # else QC207
        yield from _check_numbers(ctx, [g for g in groups if g.stack])


def _check_projections(ctx: Context, group: Fused, mixed: set[str]) -> Iterator[Finding]:
    """Yield the first problem of parts that loaders concatenate."""
    modules = group.modules
    formats = [ctx.candidate.format_of(m) for m in modules]
    if not _same_format(modules, formats):
        mixed.update(m.name for m in modules)
        return
    problems = chain(
        _check_geometry(ctx, modules),
        _check_boundaries(ctx, modules, formats[0]),
        _check_pre_quant_scales(ctx, modules),
    )
    yield from islice(problems, 1)


def _check_experts(ctx: Context, group: Fused, mixed: set[str]) -> Iterator[Finding]:
    """Yield the experts of a layer that differ from the others in one projection."""
    modules = group.modules
    usual = Counter(m.signature for m in modules).most_common(1)[0][0]
    first = next(m for m in modules if m.signature is usual)
    usual_format = ctx.candidate.format_of(first)
    for module in modules:
        fmt = ctx.candidate.format_of(module)
        if module.signature is usual and fmt is usual_format:
            continue
        if _same_format((first, module), [usual_format, fmt]):
            yield from _check_geometry(ctx, (first, module), rows=True)
        elif module.name in mixed or ctx.expectations.is_mtp(module.name):
            continue  # QC409, QC403
        elif _as_declared(ctx, module) and _as_declared(ctx, first):
            yield _finding(
                ctx,
                "formats",
                "experts of one layer have different formats",
                module.weight,
                _format_name(ctx, module),
                f"{_format_name(ctx, first)} like {first.name}",
            )


def _as_declared(ctx: Context, module: Module) -> bool:
    """Whether a module is quantized as declared; else it is QC402, QC408 or QC410."""
    entry = ctx.candidate.declared_for(module)
    declared = entry.algo is not None if entry is not None else module.quantized
    if declared != module.quantized:
        return False
    return not module.quantized or ctx.candidate.format_of(module) is not None


def _same_format(modules: Sequence[Module], formats: Sequence[Format | None]) -> bool:
    """Whether all modules are unquantized, or all have the same known layout."""
    first = formats[0]
    if not any(m.quantized for m in modules):
        return True
    return first is not None and all(f is not None and same_layout(first, f) for f in formats)


def _check_geometry(
    ctx: Context, modules: Sequence[Module], *, rows: bool = False
) -> Iterator[Finding]:
    """Yield shapes and dtypes that cannot be combined into one parameter.

    ``rows``: the parts are stacked, so their numbers of rows must be equal as well.
    """
    first = modules[0]
    for module in modules[1:]:
        if module.signature is first.signature or first.dims is None or module.dims is None:
            continue
        side = 0 if rows else 1
        if module.dims[side:] != first.dims[side:]:
            if not _have_expected_shapes(ctx, first, module):  # QC208
                yield _finding(
                    ctx,
                    "shapes",
                    "parts of one parameter have different shapes",
                    module.weight,
                    list(module.dims),
                    f"{list(first.dims)} like {first.name}",
                )
            return
    for leaf in dict.fromkeys(leaf for m in modules for leaf in m.parts):
        having = [m for m in modules if leaf in m.parts]
        if len(having) < len(modules):
            if not rows and leaf == "pre_quant_scale":
                module = next(m for m in modules if leaf not in m.parts)
                yield ctx.finding(
                    "only some parts of one parameter have a pre_quant_scale",
                    cause="some pre_quant_scales",
                    where=Where(f"{module.name}.{leaf}"),
                    observed="absent",
                    expected=f"that of {having[0].name}",
                )
            continue  # tensors that each part must have are QC301, QC302 and QC314
        yield from _check_leaf(ctx, leaf, having)


def _check_leaf(ctx: Context, leaf: str, modules: Sequence[Module]) -> Iterator[Finding]:
    """Yield tensors of one leaf that cannot be combined without a cast."""
    tensors = [m.parts[leaf] for m in modules]
    first = tensors[0]
    mismatch = next((t for t in tensors[1:] if t.dtype != first.dtype), None)
    if mismatch is not None and _have_valid_dtypes(ctx, leaf, modules):
        is_scale = leaf in SCALE_LEAVES
        loss = _cast_loss(ctx, first, mismatch) if is_scale else ""
        yield _finding(
            ctx,
            "dtypes",
            f"{'scales' if is_scale else 'weights'} of one parameter have different dtypes",
            mismatch,
            f"{mismatch.dtype}{loss}",
            f"{first.dtype} like {first.name}",
            "error" if is_scale else "warning",
        )
    elif leaf in SCALE_LEAVES:
        ranks = {len(t.shape) for t in tensors if t.elements > 1}
        if len(ranks) > 1 and all(_fits(ctx, m, leaf) for m in modules):  # scalars: QC311
            mismatch = next(t for t in tensors if len(t.shape) != len(first.shape))
            yield _finding(
                ctx,
                "ranks",
                "parts of one parameter have scales of different ranks",
                mismatch,
                list(mismatch.shape),
                f"{list(first.shape)} like {first.name}",
            )


def _have_valid_dtypes(ctx: Context, leaf: str, modules: Sequence[Module]) -> bool:
    """Whether each tensor has a dtype of its own format; else it is QC304, QC315 or QC516."""
    for module in modules:
        tensor = module.parts[leaf]
        if leaf in SCALE_LEAVES and leaf != "pre_quant_scale":
            fmt = ctx.candidate.format_of(module)
            sibling = fmt.sibling(leaf) if fmt is not None else None
            if sibling is None or tensor.dtype not in sibling.dtypes:
                return False
        elif tensor.dtype not in FLOATS or ctx.base is not None or ctx.merged_from is not None:
            return False
    return True


def _fits(ctx: Context, module: Module, leaf: str) -> bool:
    """Whether a scale has the shape that its own weight requires; else it is QC306."""
    fmt = ctx.candidate.format_of(module)
    sibling = fmt.sibling(leaf) if fmt is not None else None
    if sibling is None or module.dims is None:
        return False
    return module.parts[leaf].shape in sibling.shapes(*module.dims)


def _cast_loss(ctx: Context, first: Tensor, mismatch: Tensor) -> str:
    """Return how many values of a scale change when a loader casts it to the first one's dtype."""
    if {first.dtype, mismatch.dtype} != {"U8", "F8_E8M0"}:
        return ""
    values = ctx.payload.array(mismatch)
    count = changed_values([values], len(values), ctx.payload.array(first).dtype)
    return f": {count:,} of {values.size:,} values change in the cast"


def _check_boundaries(
    ctx: Context, modules: Sequence[Module], fmt: Format | None
) -> Iterator[Finding]:
    """Yield a part whose last block of rows extends into the next part."""
    if fmt is None or fmt.block is None or fmt.block[0] == 1:
        return
    if ctx.inputs.tp is not None or ctx.inputs.ep is not None:
        return  # QC309 checks the boundaries of the shards
    tile = fmt.block[0]
    leaves = [leaf for leaf in fmt.siblings[0].leaves if all(leaf in m.parts for m in modules)]
    if not leaves or not all(_fits(ctx, m, leaves[0]) for m in modules):
        return
    leaf = leaves[0]
    heights = [m.dims[0] for m in modules if m.dims]
    short = next((i for i, height in enumerate(heights[:-1]) if height % tile), None)
    if short is None:
        return
    arrays = [ctx.payload.array(m.parts[leaf]) for m in modules]
    # As vLLM's BlockQuantScaleParameter narrows.
    starts = [sum(heights[:i]) // tile for i in range(len(heights))]
    count = changed_values(arrays, -(-sum(heights) // tile), arrays[0].dtype, starts)
    total = sum(a.size for a in arrays)
    yield _finding(
        ctx,
        "tile",
        f"{fmt.algo}: a block of {tile} rows extends into the next part of a fused parameter",
        modules[short].parts[leaf],
        f"{heights[short]} rows; {count:,} of {total:,} scales are lost",
        f"a multiple of {tile} rows",
        "warning",
        engines=_SPLIT_BLOCK,
    )


def _check_pre_quant_scales(ctx: Context, modules: Sequence[Module]) -> Iterator[Finding]:
    """Yield a ``pre_quant_scale`` that differs from those of other parts with the same input."""
    leaf = "pre_quant_scale"
    if not all(leaf in m.parts for m in modules):
        return
    tensors = [m.parts[leaf] for m in modules]
    first = tensors[0]
    payload = ctx.payload
    mismatch = next((t for t in tensors[1:] if payload.digest(t) != payload.digest(first)), None)
    if mismatch is None:
        return
    observed = "different values"
    if (mismatch.dtype, mismatch.shape) == (first.dtype, first.shape):
        size = max(1, first.nbytes // max(1, first.elements))
        unequal = np.flatnonzero(payload.bytes_of(mismatch) != payload.bytes_of(first))
        observed = f"different values from channel {int(unequal[0]) // size:,} on"
    yield _finding(
        ctx,
        "pre_quant_scale",
        "pre_quant_scale differs between parts of one parameter that read the same input",
        mismatch,
        observed,
        f"that of {modules[0].name}",
    )


def _check_numbers(ctx: Context, stacks: Sequence[Fused]) -> Iterator[Finding]:
    """Yield gaps in the numbering of a layer's experts, if neither layout nor base states it."""
    heights = [max(group.numbers) + 1 for group in stacks]
    stated = config_value(ctx.checkpoint.config, *COUNTS) or 0
    for group, height in zip(stacks, heights, strict=True):
        # The config's number applies if at least half of the layers have it: a tower may have
        # experts of its own.
        size = stated if stated > height and 2 * heights.count(stated) >= len(heights) else height
        numbers = set(group.numbers)
        missing = size - len(numbers)
        if missing:
            gap = next(n for n in range(size) if n not in numbers)
            yield ctx.finding(
                "experts of one layer are not numbered consecutively",
                cause="numbers",
                where=Where(_numbered(group.modules[0].name, gap)),
                observed=f"{missing:,} of {size:,} missing, {gap} first",
                expected=f"0 to {size - 1}",
            )


def _numbered(module: str, expert: int) -> str:
    """Return the projection of another expert."""
    key = expert_key(module)
    return f"{key.container}.{expert}.{key.leaf}" if key is not None else module


def _have_expected_shapes(ctx: Context, *modules: Module) -> bool:
    return all(ctx.expectations.shapes.get(f"{m.name}.weight") is not None for m in modules)


def _format_name(ctx: Context, module: Module) -> str:
    fmt = ctx.candidate.format_of(module)
    dtype = module.weight.dtype if module.weight else ""
    return fmt.algo if fmt else f"unquantized {dtype}".strip()


def _finding(
    ctx: Context,
    cause: str,
    message: str,
    tensor: Tensor | None,
    observed: object,
    expected: object,
    severity: Severity | None = None,
    engines: Mapping[str, tuple[Severity, str]] | None = None,
) -> Finding:
    where = Where(tensor.name, tensor.file) if tensor is not None else None
    return ctx.finding(
        message,
        cause=cause,
        where=where,
        observed=observed,
        expected=expected,
        severity=severity,
        engines=engines,
    )
