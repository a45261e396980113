# SPDX-License-Identifier: Apache-2.0
"""Carry tensors over a `Layout` in both directions, by its own transfers: what `Layout.parts`
states is only right if values survive the way there and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from exporter.layout import Layout, take
from exporter.layout.grids import GridRegion, Shape
from exporter.layout.layout import cut_out, find_weight, region_transfer, sibling_name
from exporter.layout.siblings import MemoryWeight, Role, Transfer, meaning, transfer
from verifier.errors import UnsupportedConversion

Tensors = Mapping[str, torch.Tensor]
HubValue = tuple[GridRegion, torch.Tensor]


def to_hub(layout: Layout, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the hub tensors of tensors in memory, each with storage of its own.

    Raises:
        UnsupportedConversion: what cannot be converted, by name; colliding names; a hub tensor that
            is not filled.
    """
    hub: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for name, value in tensors.items():
        for part in layout.parts(name, tuple(value.shape)):
            moved = take(value, part.transfer)
            if part.transfer.hub_shape == moved.shape:
                if part.hub in hub:
                    raise UnsupportedConversion(
                        part.hub, "rename", layout.family, f"{name} and another tensor become it"
                    )
                hub[part.hub] = moved.clone(memory_format=torch.contiguous_format)
            else:
                target = hub.setdefault(part.hub, value.new_empty(part.transfer.hub_shape))
                cut_out(target, part.transfer.hub).copy_(moved)
            filled[part.hub] = filled.get(part.hub, 0) + moved.numel()
    for name, count in filled.items():
        if count != hub[name].numel():
            raise UnsupportedConversion(
                name, "element count", layout.family, f"{count:,} of {hub[name].numel():,} values"
            )
    return hub


def to_memory(layout: Layout, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors in memory of hub tensors; the inverse of `to_hub`.

    A scalar that every part has becomes one scalar where the parts are joined along an axis (they
    must agree), and a vector over the experts of a stack.

    Raises:
        UnsupportedConversion: what cannot be converted, by name; parts that are missing or do not
            agree.
    """
    groups: dict[tuple[str, str, str], list[HubValue]] = {}
    for name, value in tensors.items():
        weight, leaf, joint = find_weight(name, layout.places, "the hub layout", layout.family)
        for key, region in layout.places[weight]:
            groups.setdefault((key, leaf, joint), []).append((region, value))
    memory: dict[str, torch.Tensor] = {}
    for (key, leaf, joint), values in groups.items():
        name = key if leaf == "" else sibling_name(key, leaf, joint)
        memory[name] = _joined(layout, name, key, leaf, values)
    return memory


def _joined(layout: Layout, name: str, key: str, leaf: str, values: list[HubValue]) -> torch.Tensor:
    grid = layout.memory[key]
    shape = _memory_shape(layout, name, key, leaf, values)
    count = len(list(layout.members(name, leaf, grid)))
    if len(values) != count:
        raise UnsupportedConversion(
            name, "join", layout.family, f"{len(values)} of its {count} parts are here"
        )
    result = values[0][1].new_empty(shape)
    done = torch.zeros(shape, dtype=torch.bool)
    for region, value in values:
        moved = _transfer(layout, name, key, leaf, shape, region)
        if tuple(value.shape) != moved.hub_shape:
            raise UnsupportedConversion(
                name, "join", layout.family, f"{list(value.shape)}, not {list(moved.hub_shape)}"
            )
        target, seen = cut_out(result, moved.memory), cut_out(done, moved.memory)
        order = [moved.order.index(i) for i in range(len(moved.order))]
        incoming = cut_out(value, moved.hub).permute(order).reshape(target.shape)
        if bool(seen.any()) and not torch.equal(_raw(target), _raw(incoming)):
            raise UnsupportedConversion(
                name, "join", layout.family, f"its parts differ in {leaf}, {region.hub} first"
            )
        target.copy_(incoming)
        seen.fill_(True)
    if not bool(done.all()):
        raise UnsupportedConversion(name, "element count", layout.family, "its parts leave a gap")
    return result


def _transfer(
    layout: Layout, name: str, key: str, leaf: str, shape: Shape, region: GridRegion
) -> Transfer:
    hub = layout.hub[region.hub]
    if leaf == "" and shape == layout.memory[key].shape:
        return region_transfer(region, hub)
    weight = layout.weight(key)
    return transfer(name, region.axes, meaning(name, leaf, shape, weight), weight, hub)


def _memory_shape(layout: Layout, name: str, key: str, leaf: str, values: list[HubValue]) -> Shape:
    """Return the shape in memory of a tensor whose parts have the shapes that they have on the
    hub.
    """
    weight, (region, value) = layout.weight(key), values[0]
    hub = layout.hub[region.hub]
    if leaf == "" and tuple(value.shape) == hub:
        return weight.shape
    on_hub = {
        a.hub: weight.roles[a.memory] for a in region.axes if a.hub is not None and a.memory >= 0
    }
    order: tuple[Role, ...] = tuple(on_hub.get(i, "expert") for i in range(len(hub)))
    axes = meaning(name, leaf, tuple(value.shape), MemoryWeight(hub, order, layout.family))
    blocks = dict(zip(axes.roles, axes.blocks, strict=True))
    stacked = "expert" in weight.roles and "expert" not in order
    kept = [r for r in weight.roles if r in axes.roles or (r == "expert" and stacked)]
    lengths = (-(-weight.size(role) // blocks.get(role, 1)) for role in kept)
    return (*lengths, *(1 for role in axes.roles if role == "one"))


def _raw(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
