# SPDX-License-Identifier: Apache-2.0
"""QC604: parts that loaders fuse or stack do not come back as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Severity, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.fusing import Fused, fused, lost
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, SCALE_LEAVES, Format, Module, same_layout

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of routed experts of a layer."""


_SEAM: Mapping[str, tuple[Severity, str]] = {
    "vllm": ("error", "raises ValueError when it builds the layer (validate_fp8_block_shape)"),
    "sglang": ("error", "raises ValueError when it builds the layer (validate_fp8_block_shape)"),
}


@rule(
    "QC604",
    "fused parts do not come back",
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
            "copies each part into its range with a cast: what has no range of its own is overwritten",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """What loaders make one parameter of (q/k/v, gate/up, the experts of a layer) splits into the
    same bytes again.

    The parts of a fused parameter have one width and one dtype, scales included; their scales stand
    in one spelling of the shape; rows that share a scale (128x128 blocks) lie in one part; a
    ``pre_quant_scale``, which belongs to the common input, is the same in all. The experts of a
    layer are numbered from 0 without a gap and have one format and shape.

    **Why.** Parts were written by different passes; an un-fused tensor was split where the format
    has no seam; scales of the common input were smoothed for each projection alone.
    **Hurts.** vLLM and transformers cast without a word (E8M0 into U8 becomes 0, which is 2^-127),
    stop at a seam inside a block, or keep one of the scales, and every other part is wrong by the
    ratio.
    **Mend.** Write all parts of a group in one pass; leave a projection unquantized whose rows its
    blocks do not divide.

    Formats that differ within q/k/v or gate/up are QC409, global and input scales that differ QC504
    to QC506, scales that do not fit their own weight QC304 and QC306, what a known layout or a base
    tells QC205 to QC208 and QC516. Bytes are read where names, dtypes and shapes leave room for a
    difference; elsewhere the round trip is exact whatever they are.
    """
    told: set[str] = set()  # parts of pairs that are QC409's
    groups = list(fused(ctx))
    for group in groups:
        ctx.tally.see()
        yield from _experts(ctx, group, told) if group.stack else _projections(ctx, group, told)
    if ctx.expectations.why_unknown:  # else QC207
        yield from _numbers(ctx, [g for g in groups if g.stack])


def _projections(ctx: Context, group: Fused, told: set[str]) -> Iterator[Finding]:
    """Judge parts that are put behind one another."""
    modules = group.modules
    formats = [ctx.candidate.format_of(m) for m in modules]
    if not _alike(modules, formats):
        told.update(m.name for m in modules)
        return  # QC409, or what a member of no known format is called for
    found = next(_geometry(ctx, modules), None) or next(_seams(ctx, modules, formats[0]), None)
    if found is None:
        found = next(_inputs(ctx, modules), None)
    if found is not None:
        yield found


def _experts(ctx: Context, group: Fused, told: set[str]) -> Iterator[Finding]:
    """Judge one projection of all experts of a layer."""
    modules = group.modules
    usual = Counter(m.signature for m in modules).most_common(1)[0][0]
    first = next(m for m in modules if m.signature is usual)
    wanted = ctx.candidate.format_of(first)
    for module in modules:
        have = ctx.candidate.format_of(module)
        if module.signature is usual and have is wanted:
            continue
        if not _alike((first, module), [wanted, have]):
            if module.name in told or ctx.expectations.is_mtp(module.name):  # MTP is QC403's
                continue
            if _by_intent(ctx, module) and _by_intent(ctx, first):
                yield _finding(
                    ctx,
                    "experts of one layer have different formats",
                    module.weight,
                    _format(ctx, module),
                    f"{_format(ctx, first)}, as {first.name}",
                )
            continue
        yield from _geometry(ctx, (first, module), rows=True)


def _by_intent(ctx: Context, module: Module) -> bool:
    """Whether a module is stored as the declaration has it: what is not is QC402's, QC408's or
    QC410's.
    """
    cover = ctx.candidate.declared_for(module)
    declared = cover.algo is not None if cover is not None else module.quantized
    return declared == module.quantized and (
        not module.quantized or ctx.candidate.format_of(module) is not None
    )


def _alike(modules: Sequence[Module], formats: Sequence[Format | None]) -> bool:
    """Whether all are unquantized, or all of one known layout."""
    first = formats[0]
    if not any(m.quantized for m in modules):
        return True
    return first is not None and all(f is not None and same_layout(first, f) for f in formats)


def _geometry(ctx: Context, modules: Sequence[Module], *, rows: bool = False) -> Iterator[Finding]:
    """Yield what keeps tensors of one leaf from being put together; ``rows``: they are stacked and
    have equal heights.
    """
    first = modules[0]
    for module in modules[1:]:
        if module.signature is first.signature or first.dims is None or module.dims is None:
            continue
        side = 0 if rows else 1
        if module.dims[side:] != first.dims[side:]:
            if not _known(ctx, first, module):  # QC208
                yield _finding(
                    ctx,
                    "parts of one parameter have different shapes",
                    module.weight,
                    list(module.dims),
                    f"{list(first.dims)}, as {first.name}",
                )
            return
    for leaf in dict.fromkeys(leaf for m in modules for leaf in m.parts):
        having = [m for m in modules if leaf in m.parts]
        if len(having) < len(modules):
            if not rows and leaf == "pre_quant_scale":
                module = next(m for m in modules if leaf not in m.parts)
                yield ctx.finding(
                    "pre_quant_scale beside some parts of one parameter only",
                    where=Where(f"{module.name}.{leaf}"),
                    observed="absent",
                    expected=f"that of {having[0].name}",
                )
            continue  # what a part has to have of itself is QC301's, QC302's and QC314's
        yield from _leaf(ctx, leaf, having)


def _leaf(ctx: Context, leaf: str, modules: Sequence[Module]) -> Iterator[Finding]:
    """Yield what keeps the tensors of one leaf from being put together without a cast."""
    tensors = [m.parts[leaf] for m in modules]
    first = tensors[0]
    odd = next((t for t in tensors[1:] if t.dtype != first.dtype), None)
    if odd is not None and _sound_dtypes(ctx, leaf, modules):
        scale = leaf in SCALE_LEAVES
        observed = f"{odd.dtype}{_cast(ctx, first, odd) if scale else ''}"
        yield _finding(
            ctx,
            f"parts of one parameter have {'scales' if scale else 'weights'} of different dtypes",
            odd,
            observed,
            f"{first.dtype}, as {first.name}",
            "error" if scale else "warning",
        )
    elif leaf in SCALE_LEAVES:
        ranks = {len(t.shape) for t in tensors if t.elements > 1}
        if len(ranks) > 1 and all(_fits(ctx, m, leaf) for m in modules):  # of scalars QC311 says it
            odd = next(t for t in tensors if len(t.shape) != len(first.shape))
            yield _finding(
                ctx,
                "parts of one parameter spell the shape of their scales differently",
                odd,
                list(odd.shape),
                f"{list(first.shape)}, as {first.name}",
            )


def _sound_dtypes(ctx: Context, leaf: str, modules: Sequence[Module]) -> bool:
    """Whether each tensor's dtype is one that its own format allows (QC304, QC315), and no source
    has it so (QC516).
    """
    for module in modules:
        tensor = module.parts[leaf]
        if leaf in SCALE_LEAVES and leaf != "pre_quant_scale":
            found = ctx.candidate.format_of(module)
            sibling = found.sibling(leaf) if found is not None else None
            if sibling is None or tensor.dtype not in sibling.dtypes:
                return False
        elif tensor.dtype not in FLOATS or ctx.base is not None or ctx.merged_from is not None:
            return False
    return True


def _fits(ctx: Context, module: Module, leaf: str) -> bool:
    """Whether a scale has a shape that its own weight gives it: else it is QC306's."""
    found = ctx.candidate.format_of(module)
    sibling = found.sibling(leaf) if found is not None else None
    return (
        sibling is not None
        and module.dims is not None
        and module.parts[leaf].shape in sibling.shapes(*module.dims)
    )


def _cast(ctx: Context, first: Tensor, odd: Tensor) -> str:
    """Return how many values of a scale a loader's copy into a parameter of the first one's dtype
    changes.
    """
    if {first.dtype, odd.dtype} != {"U8", "F8_E8M0"}:
        return ""
    values = ctx.payload.array(odd)
    count = lost([values], len(values), ctx.payload.array(first).dtype)
    return f": {count:,} of {values.size:,} change in the copy"


def _seams(ctx: Context, modules: Sequence[Module], found: Format | None) -> Iterator[Finding]:
    """Yield a part whose last block of rows reaches into the next part."""
    if (
        found is None
        or found.block is None
        or found.block[0] == 1
        or ctx.inputs.tp is not None
        or ctx.inputs.ep is not None
    ):
        return  # with --tp and --ep QC309 divides further
    tile = found.block[0]
    leaf = next(
        (leaf for leaf in found.siblings[0].leaves if all(leaf in m.parts for m in modules)), None
    )
    if leaf is None or not all(_fits(ctx, m, leaf) for m in modules):
        return
    heights = [m.dims[0] for m in modules if m.dims]
    short = next((i for i, height in enumerate(heights[:-1]) if height % tile), None)
    if short is None:
        return
    arrays = [ctx.payload.array(m.parts[leaf]) for m in modules]
    starts = [
        sum(heights[:i]) // tile for i in range(len(heights))
    ]  # as vLLM's BlockQuantScaleParameter narrows
    count = lost(arrays, -(-sum(heights) // tile), arrays[0].dtype, starts)
    yield _finding(
        ctx,
        f"{found.algo}: a block of {tile} rows reaches over the seam to the next part",
        modules[short].parts[leaf],
        f"{heights[short]} rows; {count:,} of {sum(a.size for a in arrays):,} scales are lost",
        f"a multiple of {tile} rows",
        "warning",
        engines=_SEAM,
    )


def _inputs(ctx: Context, modules: Sequence[Module]) -> Iterator[Finding]:
    """Yield a ``pre_quant_scale`` that is not that of the other parts, which read the same
    input.
    """
    leaf = "pre_quant_scale"
    if not all(leaf in m.parts for m in modules):
        return
    tensors = [m.parts[leaf] for m in modules]
    first = tensors[0]
    odd = next((t for t in tensors[1:] if ctx.payload.digest(t) != ctx.payload.digest(first)), None)
    if odd is None:
        return
    observed = "other values"
    if (odd.dtype, odd.shape) == (first.dtype, first.shape):
        size = max(1, first.nbytes // max(1, first.elements))
        far = (
            int(np.flatnonzero(ctx.payload.bytes_of(odd) != ctx.payload.bytes_of(first))[0]) // size
        )
        observed = f"another value from channel {far:,} on"
    yield _finding(
        ctx,
        "pre_quant_scale of the common input differs between parts of one parameter",
        odd,
        observed,
        f"that of {modules[0].name}",
    )


def _numbers(ctx: Context, stacks: Sequence[Fused]) -> Iterator[Finding]:
    """Yield a gap in the numbers of a layer's experts, where neither layout nor base knows them."""
    heights = [max(group.numbers) + 1 for group in stacks]
    stated = config_value(ctx.checkpoint.config, *COUNTS) or 0
    for group, height in zip(stacks, heights, strict=True):
        # The config counts what layers have, half of them at least; a tower may have experts of its
        # own.
        size = stated if stated > height and 2 * heights.count(stated) >= len(heights) else height
        numbers = set(group.numbers)
        missing = size - len(numbers)
        if missing:
            gap = next(n for n in range(size) if n not in numbers)
            yield ctx.finding(
                "experts of one layer are not numbered through",
                where=Where(group.modules[0].name),
                observed=f"{missing:,} of {size:,} absent, {gap} first",
                expected=f"0 to {size - 1}",
            )


def _known(ctx: Context, *modules: Module) -> bool:
    return all(ctx.expectations.shapes.get(f"{m.name}.weight") is not None for m in modules)


def _format(ctx: Context, module: Module) -> str:
    found = ctx.candidate.format_of(module)
    return (
        found.algo
        if found
        else f"unquantized {module.weight.dtype if module.weight else ''}".strip()
    )


def _finding(
    ctx: Context,
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
        where=where,
        observed=observed,
        expected=expected,
        severity=severity,
        engines=engines,
    )
