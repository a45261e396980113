# SPDX-License-Identifier: Apache-2.0
"""Where each part of a hub tensor lies in the tensor in memory, as runs along axes: the operations
on names and shapes.

A conversion is carried out on shapes alone. What comes out says for every hub tensor which region
of which tensor in memory it is; a region is a start, a step and a length on each axis. Nothing is
allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from verifier.errors import UnsupportedConversion

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a piece: ``length`` entries from ``hub_start`` on, and where they lie in memory.

    ``hub`` is None for the axis of a stack that the hub does not have (the expert): then ``length``
    is 1.
    """

    hub: int | None
    memory: int
    length: int
    hub_start: int = 0
    hub_step: int = 1
    start: int = 0
    step: int = 1

    def part(self, first: int, stride: int, count: int) -> Axis:
        """Return every ``stride``-th entry from the ``first`` on, ``count`` of them."""
        return replace(
            self,
            length=count,
            start=self.start + first * self.step,
            step=self.step * stride,
            hub_start=self.hub_start + first * self.hub_step,
            hub_step=self.hub_step * stride,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a hub tensor, axis by axis."""

    hub: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor on its way: its shape, and which regions of hub tensors it is made of."""

    shape: Shape
    pieces: tuple[Piece, ...]


def whole(name: str, shape: Shape) -> Grid:
    """Return a hub tensor as it is."""
    return Grid(shape, (Piece(name, tuple(Axis(i, i, n) for i, n in enumerate(shape))),))


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a conversion, hub to memory: ``stack``, ``unstack``, ``concatenate``,
    ``chunk`` (equal parts), ``split`` (of ``sizes``), ``transpose``, ``interleave`` (halves to
    alternating) or ``deinterleave``, ``rotary`` and ``unrotary`` (the same within each head,
    ``sizes`` holding their number), ``share`` (a list among several stacks).

    ``other`` is the second axis of a transposition, and the axis along which shared stacks are
    joined; ``unless`` leaves a tensor that has this shape already as it is; ``only`` says which of
    several tensors are meant, None all.
    """

    kind: str
    dim: int
    other: int = 0
    unless: Shape | None = None
    sizes: tuple[int, ...] = ()
    only: tuple[int, ...] | None = None


def stack(grids: Sequence[Grid], dim: int) -> Grid:
    """Put tensors of one shape side by side along a new axis."""
    shapes = {g.shape for g in grids}
    if len(shapes) != 1:
        raise ValueError(f"the parts have {len(shapes)} shapes")
    (shape,) = shapes
    pieces = []
    for i, grid in enumerate(grids):
        for p in grid.pieces:
            moved = tuple(replace(a, memory=a.memory + (a.memory >= dim)) for a in p.axes)
            pieces.append(Piece(p.hub, (Axis(None, dim, 1, start=i), *moved)))
    return Grid((*shape[:dim], len(grids), *shape[dim:]), tuple(pieces))


def concatenate(grids: Sequence[Grid], dim: int) -> Grid:
    """Put tensors behind one another along an axis."""
    if len({(*g.shape[:dim], *g.shape[dim + 1 :]) for g in grids}) != 1:
        raise ValueError("the parts differ in another axis than the one that they are joined along")
    pieces, at = [], 0
    for grid in grids:
        pieces += [Piece(p.hub, tuple(_shifted(a, dim, at) for a in p.axes)) for p in grid.pieces]
        at += grid.shape[dim]
    first = grids[0].shape
    return Grid((*first[:dim], at, *first[dim + 1 :]), tuple(pieces))


def _shifted(axis: Axis, dim: int, by: int) -> Axis:
    return replace(axis, start=axis.start + by) if axis.memory == dim else axis


def transpose(grid: Grid, a: int, b: int) -> Grid:
    """Swap two axes."""
    a, b = a % len(grid.shape), b % len(grid.shape)
    swap = {a: b, b: a}
    shape = tuple(grid.shape[swap.get(i, i)] for i in range(len(grid.shape)))
    pieces = [
        Piece(p.hub, tuple(replace(x, memory=swap.get(x.memory, x.memory)) for x in p.axes))
        for p in grid.pieces
    ]
    return Grid(shape, tuple(pieces))


def interleave(grid: Grid, dim: int) -> Grid:
    """Let the two halves of an axis alternate: position o goes to 2 (o mod h) + o // h, h the
    half.
    """
    half = _half(grid, dim)

    def place(axis: Axis) -> list[Axis]:
        cut = sum(1 for k in range(axis.length) if axis.start + k * axis.step < half)
        found = []
        for first, count in ((0, cut), (cut, axis.length - cut)):
            if count:
                part = axis.part(first, 1, count)
                found.append(
                    replace(
                        part, start=2 * (part.start % half) + part.start // half, step=2 * part.step
                    )
                )
        return found

    return _along(grid, dim, place)


def deinterleave(grid: Grid, dim: int) -> Grid:
    """Bring what alternates along an axis to its two halves: position o goes to (o mod 2) h + o //
    2.
    """
    half = _half(grid, dim)

    def place(axis: Axis) -> list[Axis]:
        parts = [axis]
        if axis.step % 2:
            parts = [axis.part(i, 2, n) for i in (0, 1) if (n := (axis.length - i + 1) // 2)]
        return [
            replace(p, start=p.start % 2 * half + p.start // 2, step=max(1, p.step // 2))
            for p in parts
        ]

    return _along(grid, dim, place)


def _half(grid: Grid, dim: int) -> int:
    if grid.shape[dim] % 2:
        raise ValueError(f"an axis of {grid.shape[dim]} has no two halves")
    return grid.shape[dim] // 2


def _along(grid: Grid, dim: int, place: Callable[[Axis], Iterable[Axis]]) -> Grid:
    pieces = []
    for p in grid.pieces:
        (at,) = (i for i, a in enumerate(p.axes) if a.memory == dim)
        pieces += [
            Piece(p.hub, (*p.axes[:at], new, *p.axes[at + 1 :])) for new in place(p.axes[at])
        ]
    return Grid(grid.shape, tuple(pieces))


def cut(grid: Grid, dim: int, sizes: Sequence[int]) -> list[Grid]:
    """Cut a tensor along an axis into parts of these sizes."""
    if sum(sizes) != grid.shape[dim]:
        raise ValueError(f"an axis of {grid.shape[dim]} does not divide into {list(sizes)}")
    found, low = [], 0
    for size in sizes:
        pieces = []
        for p in grid.pieces:
            (at,) = (i for i, a in enumerate(p.axes) if a.memory == dim)
            axis = p.axes[at]
            inside = [
                k for k in range(axis.length) if low <= axis.start + k * axis.step < low + size
            ]
            if inside:
                part = axis.part(inside[0], 1, len(inside))
                pieces.append(
                    Piece(
                        p.hub,
                        (*p.axes[:at], replace(part, start=part.start - low), *p.axes[at + 1 :]),
                    )
                )
        found.append(Grid((*grid.shape[:dim], size, *grid.shape[dim + 1 :]), tuple(pieces)))
        low += size
    return found


def squeeze(grid: Grid, dim: int) -> Grid:
    """Drop an axis of length 1; its place is then an axis of the hub only, which memory has in no
    axis.
    """
    pieces = []
    for p in grid.pieces:
        kept = tuple(
            replace(a, memory=a.memory - (a.memory > dim)) for a in p.axes if a.memory != dim
        )
        gone = tuple(replace(a, memory=-1) for a in p.axes if a.memory == dim and a.hub is not None)
        pieces.append(Piece(p.hub, (*gone, *kept)))
    return Grid((*grid.shape[:dim], *grid.shape[dim + 1 :]), tuple(pieces))


def run(ops: Sequence[Op], groups: Sequence[Sequence[Grid]], outputs: int | None) -> list[Grid]:
    """Carry out a conversion.

    Args:
        ops: hub to memory.
        groups: the hub tensors of each source pattern, in the loader's order.
        outputs: how many tensors it gives; None where a stack is taken apart.

    Raises:
        ValueError: what does not fit, in a sentence.
    """
    lists = [list(g) for g in groups]
    for op in ops:
        if op.kind == "stack":
            lists = [[stack(g, op.dim)] for g in lists]
        elif op.kind == "concatenate":
            lists = [[concatenate([x for g in lists for x in g], op.dim)]]
        elif op.kind == "chunk":
            (one,) = lists
            grid, count = one[0], outputs or 1
            if grid.shape[op.dim] % count:
                raise ValueError(
                    f"an axis of {grid.shape[op.dim]} does not divide into {count} parts"
                )
            lists = [[g] for g in cut(grid, op.dim, [grid.shape[op.dim] // count] * count)]
        elif op.kind == "split":
            (one,) = lists
            lists = [[g] for g in cut(one[0], op.dim, op.sizes)]
        elif op.kind == "unstack":
            lists = [
                [squeeze(x, op.dim) for x in cut(g[0], op.dim, [1] * g[0].shape[op.dim])]
                for g in lists
            ]
        elif op.kind == "share":
            count = outputs or 1
            size = -(-max(map(len, lists)) // count)
            shares = [
                [stack(g[i * size : (i + 1) * size], op.dim) for g in lists] for i in range(count)
            ]
            lists = [[concatenate(s, op.other)] for s in shares]
        else:
            chosen = range(len(lists)) if op.only is None else op.only
            lists = [[_one(op, x) for x in g] if i in chosen else g for i, g in enumerate(lists)]
    return [x for g in lists for x in g]


def _one(op: Op, grid: Grid) -> Grid:
    if op.kind == "transpose":
        return grid if op.unless == grid.shape else transpose(grid, op.dim, op.other)
    if op.kind in ("interleave", "deinterleave"):
        return (interleave if op.kind == "interleave" else deinterleave)(grid, op.dim)
    if op.kind in ("rotary", "unrotary"):
        (heads,) = op.sizes
        if heads < 1 or grid.shape[op.dim] % (2 * heads):
            raise ValueError(
                f"{grid.shape[op.dim]} rows do not divide into the halves of {heads} heads"
            )
        each = cut(grid, op.dim, [grid.shape[op.dim] // heads] * heads)
        turn = deinterleave if op.kind == "rotary" else interleave
        return concatenate([turn(head, op.dim) for head in each], op.dim)
    raise ValueError(f"no operation {op.kind!r}")


Run = tuple[int, int, int]
"""Start, step and length along one axis."""


def cover(
    key: str, shape: Shape, regions: Sequence[tuple[str, Mapping[int, Run]]], family: str
) -> None:
    """Hold a tensor to the regions that it is made of: each value is covered once.

    Args:
        key: the tensor's name.
        shape: its shape.
        regions: for each part its name and its run on each axis.
        family: for the message.

    Raises:
        UnsupportedConversion: regions that overlap, leave a gap, or reach beyond the shape.
    """
    total = 0
    buckets: dict[tuple[tuple[int, int], ...], list[tuple[str, Mapping[int, Run]]]] = {}
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
        total += math.prod(n for _, _, n in runs.values())
        single = tuple(sorted((a, r[0]) for a, r in runs.items() if r[2] == 1 and shape[a] > 1))
        buckets.setdefault(single, []).append((name, runs))
    if total != math.prod(shape):
        what = f"its parts hold {total:,} values, and it holds {math.prod(shape):,}"
        raise UnsupportedConversion(key, "element count", family, what)
    for bucket in buckets.values():
        for i, (name, runs) in enumerate(bucket):
            for other, theirs in bucket[:i]:
                if not any(_apart(runs[a], theirs[a]) for a in runs):
                    raise UnsupportedConversion(
                        key, "bijection", family, f"{other} and {name} lie in the same place"
                    )


def _apart(a: Run, b: Run) -> bool:
    if a[0] + (a[2] - 1) * a[1] < b[0] or b[0] + (b[2] - 1) * b[1] < a[0]:
        return True
    return (a[0] - b[0]) % math.gcd(a[1], b[1]) != 0


__all__ = [
    "Axis",
    "Grid",
    "Op",
    "Piece",
    "Run",
    "Shape",
    "concatenate",
    "cover",
    "cut",
    "deinterleave",
    "interleave",
    "run",
    "squeeze",
    "stack",
    "transpose",
    "whole",
]
