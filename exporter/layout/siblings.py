# SPDX-License-Identifier: Apache-2.0
"""What the axes of a weight and of its quantized siblings mean, and which part of a sibling belongs
to a part of the weight.

A weight has the axes ``expert`` (a stack only), ``out`` and ``in``. A sibling has some of them,
each in blocks of so many entries of the weight: ``weight_scale`` of NVFP4 is out by in/16,
``pre_quant_scale`` is in, ``bias`` is out, ``weight_scale_2`` is a scalar, or one per expert. Where
a sibling lacks the axis along which a weight is divided, the whole sibling goes to every part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.layout.grids import Axis, AxisRun, Shape
from exporter.layout.regions import Cut
from verifier.errors import UnsupportedConversion
from verifier.schemes import FORMATS, KV_LEAVES, SCALE_LEAVES

Role = Literal["expert", "out", "in", "one"]
"""The meaning of an axis; ``one`` is an axis of length 1 without a meaning."""
SIBLINGS = (SCALE_LEAVES - {"scales"}) | KV_LEAVES | {"bias"}
SCALARS = KV_LEAVES | {
    "weight_scale_2",
    "input_scale",
    "weight_global_scale",
    "input_global_scale",
}
_WRITTEN = (FORMATS[name].block for name in ("nvfp4", "mxfp8", "fp8_block"))
_BLOCKS = tuple(block for block in _WRITTEN if block is not None)


@dataclass(frozen=True, slots=True)
class MemoryWeight:
    """A weight in memory: its logical shape in elements, and the meaning of its axes."""

    shape: Shape
    roles: tuple[Role, ...]
    family: str

    def size(self, role: Role) -> int:
        """Return the length of the axis with a meaning."""
        return self.shape[self.roles.index(role)]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of each axis of a tensor, and the entries of the weight that one entry covers."""

    roles: tuple[Role, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Which region of a tensor in memory is which region of a hub tensor.

    ``memory`` and ``hub`` have one cut per axis of either; ``order`` permutes the axes that the
    first leaves into those of the second.
    """

    memory: tuple[Cut, ...]
    hub: tuple[Cut, ...]
    order: tuple[int, ...]
    hub_shape: Shape


def meaning(key: str, leaf: str, shape: Shape, weight: MemoryWeight) -> Meaning:
    """Return what the axes of a tensor mean.

    Args:
        key: its name, for messages.
        leaf: ``weight`` (or '' for a bare parameter), or a sibling's leaf.
        shape: its shape; a packed weight has half the entries on ``in``.
        weight: the weight that it belongs to.

    Raises:
        UnsupportedConversion: the leaf cannot have this shape.
    """
    if leaf in ("", "weight"):
        readings = [_weight_meaning(shape, weight)]
    else:
        readings = [_fit(order, shape, weight, leaf) for order in _orders(leaf, weight.roles)]
    first = next((reading for reading in readings if reading is not None), None)
    if first is None:
        raise UnsupportedConversion(
            key,
            "axes",
            weight.family,
            f"the shape {list(shape)} has no meaning for a weight of {list(weight.shape)}",
        )
    return first


def _weight_meaning(shape: Shape, weight: MemoryWeight) -> Meaning | None:
    """Return the reading of a shape as the weight's own, packed along ``in`` or not."""
    if len(shape) != len(weight.shape):
        return None
    blocks = []
    for role, length, full in zip(weight.roles, shape, weight.shape, strict=True):
        packed = role == "in" and length * 2 == full
        if length != full and not packed:
            return None
        blocks.append(2 if packed and full else 1)
    return Meaning(weight.roles, tuple(blocks))


def _orders(leaf: str, roles: Sequence[Role]) -> list[tuple[Role, ...]]:
    """Return the axes that a leaf may have, the most likely first."""
    expert: tuple[Role, ...] = ("expert",) if "expert" in roles else ()
    if leaf == "pre_quant_scale":
        return [("in",), (*expert, "in")]
    if leaf == "bias":
        return [(*expert, "out")]
    if leaf in SCALARS:
        return [(), expert]
    rows: tuple[Role, ...] = tuple(r for r in roles if r != "in")
    return [tuple(roles), (), expert, rows] if expert else [tuple(roles), (), rows]


def _fit(order: tuple[Role, ...], shape: Shape, weight: MemoryWeight, leaf: str) -> Meaning | None:
    """Return the reading of a shape as these axes, or None; further axes of length 1 are
    allowed.
    """
    if len(shape) < len(order) or any(n != 1 for n in shape[len(order) :]):
        return None
    ones: tuple[Role, ...] = tuple("one" for _ in shape[len(order) :])
    blocked = {"out", "in"} <= set(order)
    for rows, columns in _BLOCKS if blocked else ((1, 1),):
        per: dict[Role, int] = {"expert": 1, "out": rows, "in": columns}
        lengths = [-(-weight.size(role) // per[role]) for role in order]
        if lengths == list(shape[: len(order)]):
            blocks = (*(per[role] for role in order), *(1 for _ in ones))
            return Meaning((*order, *ones), blocks)
    if blocked and leaf.startswith("weight_scale"):  # one scale per row, written [out, 1]
        by_row: list[Role] = ["one" if role == "in" else role for role in order]
        lengths = [1 if role == "one" else weight.size(role) for role in by_row]
        if lengths == list(shape[: len(order)]):
            return Meaning((*by_row, *ones), (1,) * len(shape))
    return None


def transfer(
    key: str, axes: Sequence[Axis], tensor: Meaning, weight: MemoryWeight, hub: Shape
) -> Transfer:
    """Return how one region of a weight carries over to a sibling of it.

    Args:
        key: the sibling's name, for messages.
        axes: the region, as the weight has it.
        tensor: the meaning of the sibling's axes.
        weight: the weight.
        hub: the logical shape of the weight on the hub.

    Raises:
        UnsupportedConversion: a seam inside a block.
    """
    by_memory = {a.memory: a for a in axes if a.memory >= 0}
    memory: list[Cut] = []
    on_hub: list[tuple[int, Cut, int]] = []  # rank on the hub, the cut there, length of that axis
    for i, (role, block) in enumerate(zip(tensor.roles, tensor.blocks, strict=True)):
        if role == "one":
            memory.append(Cut(0, 1, 1))
            on_hub.append((len(hub) + i, Cut(0, 1, 1), 1))
            continue
        axis = by_memory[weight.roles.index(role)]
        runs = [((axis.start, axis.step, axis.length), weight.size(role))]
        if axis.hub is not None:
            runs.append(((axis.hub_start, axis.hub_step, axis.length), hub[axis.hub]))
        for run, total in runs:
            _require_on_block_seam(key, run, block, total, role, weight.family)
        memory.append(_in_blocks(runs[0][0], block, drop=axis.hub is None))
        if axis.hub is not None:
            on_hub.append((axis.hub, _in_blocks(runs[1][0], block), -(-hub[axis.hub] // block)))
    order = sorted(range(len(on_hub)), key=lambda i: on_hub[i][0])
    ranked = [on_hub[i] for i in order]
    return Transfer(
        tuple(memory),
        tuple(cut for _, cut, _ in ranked),
        tuple(order),
        tuple(length for _, _, length in ranked),
    )


def _require_on_block_seam(
    key: str, run: AxisRun, block: int, total: int, role: Role, family: str
) -> None:
    start, step, length = run
    end = start + length
    if block == 1 or (step == 1 and not start % block and (not end % block or end == total)):
        return
    seam = f"every {step} entries" if step != 1 else f"{start if start % block else end}"
    raise UnsupportedConversion(
        key,
        "split",
        family,
        f"the seam on {role} is at {seam}, inside a block of {block}; cutting it would take "
        "re-quantizing",
    )


def _in_blocks(run: AxisRun, block: int, *, drop: bool = False) -> Cut:
    """Return a run of entries as a cut of blocks."""
    start, step, length = run
    if block == 1:
        return Cut(start, step, length, drop)
    return Cut(start // block, 1, -(-length // block), drop)
