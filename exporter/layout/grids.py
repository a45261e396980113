# SPDX-License-Identifier: Apache-2.0
"""Which region of a tensor in memory each region of a hub tensor is: conversions on shapes alone.

A conversion runs on names and shapes; nothing is allocated. Its result states for every tensor in
memory the regions of hub tensors that it is made of; a region is a start, a step and a length on
each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from verifier.errors import UnsupportedConversion

Shape = tuple[int, ...]
AxisRun = tuple[int, int, int]
"""Start, step and length along one axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a region: ``length`` entries of the hub tensor, and where they are in memory.

    ``hub`` is the axis of the hub tensor, None for the expert axis of a stack, which the hub tensor
    does not have (``length`` is then 1). ``memory`` is the axis in memory, -1 where memory has
    none.
    """

    hub: int | None
    memory: int
    length: int
    hub_start: int = 0
    hub_step: int = 1
    start: int = 0
    step: int = 1

    def part(self, first: int, stride: int, count: int) -> Axis:
        """Return ``count`` entries: every ``stride``-th from ``first``."""
        return replace(
            self,
            length=count,
            start=self.start + first * self.step,
            step=self.step * stride,
            hub_start=self.hub_start + first * self.hub_step,
            hub_step=self.hub_step * stride,
        )


@dataclass(frozen=True, slots=True)
class GridRegion:
    """A region of a hub tensor, axis by axis."""

    hub: str
    axes: tuple[Axis, ...]

    def index_of(self, dim: int) -> int:
        """Return the index of the axis that is axis ``dim`` in memory."""
        (index,) = (i for i, a in enumerate(self.axes) if a.memory == dim)
        return index

    def with_axis(self, index: int, axis: Axis) -> GridRegion:
        """Return the region with one axis replaced."""
        return GridRegion(self.hub, (*self.axes[:index], axis, *self.axes[index + 1 :]))


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor during a conversion: its shape, and the regions of hub tensors it is made of."""

    shape: Shape
    regions: tuple[GridRegion, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a conversion from hub to memory.

    ``kind`` is ``stack``, ``unstack``, ``concatenate``, ``chunk`` (equal parts), ``split`` (into
    ``sizes``), ``transpose``, ``interleave`` (halves to alternating entries), ``deinterleave``,
    ``rotary`` and ``unrotary`` (the same within each of ``sizes[0]`` heads), or ``share`` (a list
    divided among several stacks).

    ``other`` is the second axis of a transposition, and the axis along which shared stacks are
    joined; a tensor that has the shape ``unless`` is not changed; ``only`` lists the tensors that
    the operation applies to, None all.
    """

    kind: str
    dim: int
    other: int = 0
    unless: Shape | None = None
    sizes: tuple[int, ...] = ()
    only: tuple[int, ...] | None = None


def whole(name: str, shape: Shape) -> Grid:
    """Return a hub tensor as it is."""
    axes = tuple(Axis(i, i, n) for i, n in enumerate(shape))
    return Grid(shape, (GridRegion(name, axes),))


def stack(grids: Sequence[Grid], dim: int) -> Grid:
    """Stack tensors of one shape along a new axis."""
    shapes = {g.shape for g in grids}
    if len(shapes) != 1:
        raise ValueError(f"the parts have {len(shapes)} different shapes")
    (shape,) = shapes
    regions = []
    for i, grid in enumerate(grids):
        for region in grid.regions:
            moved = (replace(a, memory=a.memory + (a.memory >= dim)) for a in region.axes)
            regions.append(GridRegion(region.hub, (Axis(None, dim, 1, start=i), *moved)))
    return Grid((*shape[:dim], len(grids), *shape[dim:]), tuple(regions))


def concatenate(grids: Sequence[Grid], dim: int) -> Grid:
    """Join tensors along an existing axis."""
    if len({(*g.shape[:dim], *g.shape[dim + 1 :]) for g in grids}) != 1:
        raise ValueError(f"the parts differ in an axis other than axis {dim}, which joins them")
    regions, end = [], 0
    for grid in grids:
        for region in grid.regions:
            axes = tuple(_shifted(a, dim, end) for a in region.axes)
            regions.append(GridRegion(region.hub, axes))
        end += grid.shape[dim]
    first = grids[0].shape
    return Grid((*first[:dim], end, *first[dim + 1 :]), tuple(regions))


def _shifted(axis: Axis, dim: int, by: int) -> Axis:
    return replace(axis, start=axis.start + by) if axis.memory == dim else axis


def transpose(grid: Grid, a: int, b: int) -> Grid:
    """Swap two axes."""
    a, b = a % len(grid.shape), b % len(grid.shape)
    swap = {a: b, b: a}
    shape = tuple(grid.shape[swap.get(i, i)] for i in range(len(grid.shape)))
    regions = []
    for region in grid.regions:
        axes = tuple(replace(x, memory=swap.get(x.memory, x.memory)) for x in region.axes)
        regions.append(GridRegion(region.hub, axes))
    return Grid(shape, tuple(regions))


def interleave(grid: Grid, dim: int) -> Grid:
    """Let the two halves of an axis alternate: entry o moves to 2 (o mod half) + o // half."""
    half = _half(grid, dim)

    def interleaved(axis: Axis) -> list[Axis]:
        in_first = sum(1 for k in range(axis.length) if axis.start + k * axis.step < half)
        axes = []
        for first, count in ((0, in_first), (in_first, axis.length - in_first)):
            if count:
                part = axis.part(first, 1, count)
                start = 2 * (part.start % half) + part.start // half
                axes.append(replace(part, start=start, step=2 * part.step))
        return axes

    return _map_axis(grid, dim, interleaved)


def deinterleave(grid: Grid, dim: int) -> Grid:
    """Bring alternating entries to two halves: entry o moves to (o mod 2) half + o // 2."""
    half = _half(grid, dim)

    def deinterleaved(axis: Axis) -> list[Axis]:
        parts = [axis]
        if axis.step % 2:
            counts = ((axis.length + 1) // 2, axis.length // 2)
            parts = [axis.part(i, 2, n) for i, n in enumerate(counts) if n]
        return [
            replace(p, start=p.start % 2 * half + p.start // 2, step=max(1, p.step // 2))
            for p in parts
        ]

    return _map_axis(grid, dim, deinterleaved)


def _half(grid: Grid, dim: int) -> int:
    if grid.shape[dim] % 2:
        raise ValueError(f"an axis of {grid.shape[dim]} entries does not divide into halves")
    return grid.shape[dim] // 2


def _map_axis(grid: Grid, dim: int, change: Callable[[Axis], Iterable[Axis]]) -> Grid:
    regions = []
    for region in grid.regions:
        index = region.index_of(dim)
        regions += [region.with_axis(index, axis) for axis in change(region.axes[index])]
    return Grid(grid.shape, tuple(regions))


def split(grid: Grid, dim: int, sizes: Sequence[int]) -> list[Grid]:
    """Split a tensor along an axis into parts of these sizes."""
    if sum(sizes) != grid.shape[dim]:
        raise ValueError(f"an axis of {grid.shape[dim]} does not divide into {list(sizes)}")
    parts, low = [], 0
    for size in sizes:
        regions = []
        for region in grid.regions:
            index = region.index_of(dim)
            axis = region.axes[index]
            entries = [axis.start + k * axis.step for k in range(axis.length)]
            inside = [k for k, entry in enumerate(entries) if low <= entry < low + size]
            if inside:
                part = axis.part(inside[0], 1, len(inside))
                moved = replace(part, start=part.start - low)
                regions.append(region.with_axis(index, moved))
        parts.append(Grid((*grid.shape[:dim], size, *grid.shape[dim + 1 :]), tuple(regions)))
        low += size
    return parts


def squeeze(grid: Grid, dim: int) -> Grid:
    """Drop an axis of length 1 from memory; the hub tensor keeps its own."""
    regions = []
    for region in grid.regions:
        dropped, others = [], []
        for axis in region.axes:
            if axis.memory != dim:
                others.append(replace(axis, memory=axis.memory - (axis.memory > dim)))
            elif axis.hub is not None:
                dropped.append(replace(axis, memory=-1))
        regions.append(GridRegion(region.hub, (*dropped, *others)))
    return Grid((*grid.shape[:dim], *grid.shape[dim + 1 :]), tuple(regions))


def apply_ops(
    ops: Sequence[Op], groups: Sequence[Sequence[Grid]], outputs: int | None
) -> list[Grid]:
    """Carry out a conversion.

    Args:
        ops: the operations, hub to memory.
        groups: the hub tensors of each source pattern, in the loader's order.
        outputs: how many tensors the conversion gives; None where it unstacks.

    Raises:
        ValueError: the shapes do not fit an operation; the message is a sentence.
    """
    lists = [list(group) for group in groups]
    for op in ops:
        lists = _apply(op, lists, outputs or 1)
    return [grid for group in lists for grid in group]


def _apply(op: Op, lists: list[list[Grid]], outputs: int) -> list[list[Grid]]:
    if op.kind == "stack":
        return [[stack(group, op.dim)] for group in lists]
    if op.kind == "concatenate":
        return [[concatenate([grid for group in lists for grid in group], op.dim)]]
    if op.kind == "share":
        size = -(-max(map(len, lists)) // outputs)
        shares = []
        for start in range(0, outputs * size, size):
            stacks = [stack(group[start : start + size], op.dim) for group in lists]
            shares.append([concatenate(stacks, op.other)])
        return shares
    if op.kind == "unstack":
        unstacked = []
        for (grid,) in lists:
            slices = split(grid, op.dim, [1] * grid.shape[op.dim])
            unstacked.append([squeeze(s, op.dim) for s in slices])
        return unstacked
    if op.kind in ("chunk", "split"):
        ((grid,),) = lists
        length = grid.shape[op.dim]
        if op.kind == "chunk" and length % outputs:
            raise ValueError(f"an axis of {length} does not divide into {outputs} parts")
        sizes = op.sizes if op.kind == "split" else [length // outputs] * outputs
        return [[part] for part in split(grid, op.dim, sizes)]
    return [
        [_apply_to_one(op, grid) for grid in group] if op.only is None or i in op.only else group
        for i, group in enumerate(lists)
    ]


def _apply_to_one(op: Op, grid: Grid) -> Grid:
    if op.kind == "transpose":
        return grid if op.unless == grid.shape else transpose(grid, op.dim, op.other)
    if op.kind in ("interleave", "deinterleave"):
        return (interleave if op.kind == "interleave" else deinterleave)(grid, op.dim)
    if op.kind in ("rotary", "unrotary"):
        (heads,) = op.sizes
        rows = grid.shape[op.dim]
        if heads < 1 or rows % (2 * heads):
            raise ValueError(f"{rows} rows do not divide into the halves of {heads} heads")
        each = split(grid, op.dim, [rows // heads] * heads)
        reorder = deinterleave if op.kind == "rotary" else interleave
        return concatenate([reorder(head, op.dim) for head in each], op.dim)
    raise ValueError(f"unknown operation {op.kind}")


def require_cover(
    key: str, shape: Shape, regions: Sequence[tuple[str, Mapping[int, AxisRun]]], family: str
) -> None:
    """Check that a tensor's regions cover each of its values once.

    Args:
        key: the tensor's name.
        shape: its shape.
        regions: for each part its name and its run on each axis.
        family: for the message.

    Raises:
        UnsupportedConversion: regions that overlap, leave a gap, or reach beyond the shape.
    """
    total = 0
    buckets: dict[tuple[tuple[int, int], ...], list[tuple[str, Mapping[int, AxisRun]]]] = {}
    for name, runs in regions:
        for axis, (start, step, length) in runs.items():
            if not 0 <= start <= start + (length - 1) * step < shape[axis]:
                raise UnsupportedConversion(
                    key, "bounds", family, f"{name} reaches beyond its shape {list(shape)}"
                )
        if len(runs) != len(shape):
            raise UnsupportedConversion(
                key, "axes", family, f"{name} has {len(runs)} of its {len(shape)} axes"
            )
        total += math.prod(length for _, _, length in runs.values())
        # Regions that are one different entry of an axis do not overlap: compare within a bucket.
        single = (
            (axis, start)
            for axis, (start, _, length) in runs.items()
            if length == 1 and shape[axis] > 1
        )
        buckets.setdefault(tuple(sorted(single)), []).append((name, runs))
    if total != math.prod(shape):
        text = f"its parts hold {total:,} values, the tensor {math.prod(shape):,}"
        raise UnsupportedConversion(key, "element count", family, text)
    for bucket in buckets.values():
        _require_disjoint(key, bucket, family)


def _require_disjoint(
    key: str, regions: Sequence[tuple[str, Mapping[int, AxisRun]]], family: str
) -> None:
    for i, (name, runs) in enumerate(regions):
        for other, other_runs in regions[:i]:
            if not any(_disjoint(runs[axis], other_runs[axis]) for axis in runs):
                raise UnsupportedConversion(
                    key, "bijection", family, f"{other} and {name} overlap in memory"
                )


def _disjoint(a: AxisRun, b: AxisRun) -> bool:
    a_start, a_step, a_length = a
    b_start, b_step, b_length = b
    if a_start + (a_length - 1) * a_step < b_start or b_start + (b_length - 1) * b_step < a_start:
        return True
    return (a_start - b_start) % math.gcd(a_step, b_step) != 0
