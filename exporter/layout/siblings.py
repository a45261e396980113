# SPDX-License-Identifier: Apache-2.0
"""What the axes of a weight and of its quantized siblings mean, and what of a sibling belongs to a
part of the weight.

A weight has the axes ``expert`` (a stack only), ``out`` and ``in``. A sibling has some of them,
each in blocks of so many entries of the weight: ``weight_scale`` of NVFP4 is out by in/16,
``pre_quant_scale`` is in, ``bias`` is out, ``weight_scale_2`` is a scalar, or one for each expert.
What a part of the weight is on ``out`` says nothing of a sibling that has no such axis: the sibling
goes to every part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.layout.pieces import Axis, Shape
from verifier.errors import UnsupportedConversion
from verifier.schemes import FORMATS, KV_LEAVES, SCALE_LEAVES

Role = Literal["expert", "out", "in", "one"]
"""The meaning of an axis; ``one`` is an axis of length 1 without a meaning."""
SIBLINGS = (SCALE_LEAVES - {"scales"}) | KV_LEAVES | {"bias"}
SCALARS = (
    frozenset({"weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale"})
    | KV_LEAVES
)
_BLOCKS = tuple(dict.fromkeys(f.block for f in FORMATS.values() if f.block is not None))


@dataclass(frozen=True, slots=True)
class Meaning:
    """The axes of one tensor: what each means, and how many entries of the weight one entry stands
    for.
    """

    roles: tuple[Role, ...]
    blocks: tuple[int, ...]


def meaning(
    key: str, leaf: str, shape: Shape, weight: Shape, roles: Sequence[Role], family: str
) -> Meaning:
    """Return what the axes of a tensor mean.

    Args:
        key: its name, for messages.
        leaf: ``weight`` (or '' for a bare parameter), or a sibling's leaf.
        shape: its shape; a packed weight has half the entries on ``in``.
        weight: the logical shape of the weight, in elements.
        roles: the meaning of the weight's axes.
        family: for messages.

    Raises:
        UnsupportedConversion: a shape that no reading of the leaf has.
    """
    sizes: dict[Role, int] = dict(zip(roles, weight, strict=True))
    if leaf in ("", "weight"):
        blocks = (
            tuple(w // s if s else 1 for w, s in zip(weight, shape, strict=True))
            if len(weight) == len(shape)
            else ()
        )
        legal = all(b == 1 or (r == "in" and b == 2) for b, r in zip(blocks, roles, strict=False))
        if (
            len(blocks) == len(weight)
            and legal
            and all(s * b == w for s, b, w in zip(shape, blocks, weight, strict=True))
        ):
            return Meaning(tuple(roles), blocks)
        raise _misfit(key, shape, weight, family)
    wanted = _orders(leaf, roles)
    for order in wanted:
        found = _fits(order, shape, sizes, leaf)
        if found is not None:
            return found
    raise _misfit(key, shape, weight, family)


def _misfit(key: str, shape: Shape, weight: Shape, family: str) -> UnsupportedConversion:
    return UnsupportedConversion(
        key, "axes", family, f"{list(shape)} has no meaning beside a weight of {list(weight)}"
    )


def _orders(leaf: str, roles: Sequence[Role]) -> list[tuple[Role, ...]]:
    """Return the axes that a leaf may have, the likeliest first."""
    expert: tuple[Role, ...] = ("expert",) if "expert" in roles else ()
    if leaf == "pre_quant_scale":
        return [("in",), (*expert, "in")]
    if leaf == "bias":
        return [(*expert, "out")]
    if leaf in SCALARS:
        return [(), expert]
    rows: tuple[Role, ...] = tuple(r for r in roles if r != "in")
    return [tuple(roles), (), expert, rows] if expert else [tuple(roles), (), rows]


def _fits(
    order: tuple[Role, ...], shape: Shape, sizes: Mapping[Role, int], leaf: str
) -> Meaning | None:
    """Return the reading of a shape as these axes, or None; further axes of length 1 are
    allowed.
    """
    if len(shape) < len(order) or any(n != 1 for n in shape[len(order) :]):
        return None
    rest: tuple[Role, ...] = tuple("one" for _ in shape[len(order) :])
    grids = _BLOCKS if {"out", "in"} <= set(order) else ((1, 1),)
    for rows, columns in grids:
        per: dict[Role, int] = {"expert": 1, "out": rows, "in": columns}
        if all(n == -(-sizes[r] // per[r]) for r, n in zip(order, shape, strict=False)):
            return Meaning((*order, *rest), (*(per[r] for r in order), *(1 for _ in rest)))
    if {"out", "in"} <= set(order) and leaf.startswith(
        "weight_scale"
    ):  # one scale a row, written [out, 1]
        full: list[Role] = ["one" if r == "in" else r for r in order]
        if all(n == (1 if r == "one" else sizes[r]) for r, n in zip(full, shape, strict=False)):
            return Meaning((*full, *rest), (1,) * len(shape))
    return None


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries of one axis: from ``start``, every ``step``-th, ``length`` of them; ``drop`` removes
    the axis.
    """

    start: int
    step: int
    length: int
    drop: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """What of a tensor in memory is what of a hub tensor.

    ``memory`` and ``hub`` cut each axis of either; what the first leaves is brought to the second's
    order by ``order``.
    """

    memory: tuple[Cut, ...]
    hub: tuple[Cut, ...]
    order: tuple[int, ...]
    hub_shape: Shape


def transfer(
    key: str,
    axes: Sequence[Axis],
    found: Meaning,
    shape: Shape,
    roles: Sequence[Role],
    weight: Shape,
    hub: Shape,
    family: str,
    *,
    hub_rank: int,
) -> Transfer:
    """Return how one piece of a weight carries over to a tensor beside it.

    Args:
        key: the tensor's name, for messages.
        axes: the piece, as the weight has it.
        found: the meaning of the tensor's axes.
        shape: the tensor's shape in memory.
        roles: the meaning of the weight's axes in memory.
        weight: its logical shape in memory.
        hub: its logical shape on the hub.
        family: for messages.
        hub_rank: how many axes the weight has on the hub.

    Raises:
        UnsupportedConversion: a seam that falls inside a block.
    """
    by_memory = {a.memory: a for a in axes if a.memory >= 0}
    memory: list[Cut] = []
    kept: list[tuple[int, Cut, int]] = []  # (order on the hub, the cut there, length of that axis)
    for i, (role, block) in enumerate(zip(found.roles, found.blocks, strict=True)):
        if role == "one":
            memory.append(Cut(0, 1, shape[i]))
            kept.append((hub_rank + i, Cut(0, 1, 1), 1))
            continue
        at = tuple(roles).index(role)
        axis = by_memory[at]
        memory.append(
            _blocked(
                key,
                axis.start,
                axis.step,
                axis.length,
                block,
                weight[at],
                role,
                family,
                axis.hub is None,
            )
        )
        if axis.hub is not None:
            total = hub[axis.hub]
            there = _blocked(
                key, axis.hub_start, axis.hub_step, axis.length, block, total, role, family, False
            )
            kept.append((axis.hub, there, -(-total // block)))
    places = {p: n for n, p in enumerate(sorted(p for p, _, _ in kept))}
    order = [0] * len(kept)
    for i, (p, _, _) in enumerate(kept):
        order[places[p]] = i
    ranked = sorted(kept, key=lambda k: k[0])
    return Transfer(
        tuple(memory), tuple(c for _, c, _ in ranked), tuple(order), tuple(n for _, _, n in ranked)
    )


def _blocked(
    key: str,
    start: int,
    step: int,
    length: int,
    block: int,
    total: int,
    role: Role,
    family: str,
    drop: bool,
) -> Cut:
    if block == 1:
        return Cut(start, step, length, drop)
    end = start + length
    if step != 1 or start % block or (end % block and end != total):
        seam = f"every {step} entries" if step != 1 else f"{start if start % block else end}"
        raise UnsupportedConversion(
            key,
            "split",
            family,
            f"the seam on {role} is at {seam}, inside a block of {block}: it cannot be cut without "
            "quantizing anew",
        )
    return Cut(start // block, 1, -(-length // block), drop)
