# SPDX-License-Identifier: Apache-2.0
"""One model's layout: which tensors in memory are which hub tensors, with their siblings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from exporter.layout.grids import AxisRun, Grid, GridRegion, Shape, require_cover
from exporter.layout.regions import Cut
from exporter.layout.siblings import SIBLINGS, MemoryWeight, Role, Transfer, meaning, transfer
from verifier.errors import UnsupportedConversion
from verifier.schemes import KV_LEAVES


@dataclass(frozen=True, slots=True)
class HubPart:
    """A hub tensor, or a region of one, that a tensor in memory holds."""

    hub: str
    transfer: Transfer


@dataclass(frozen=True)
class Layout:
    """Tensors in memory by name, as grids of hub tensors.

    ``hub`` gives the logical shape of each hub weight; ``transposed`` names the stacks in memory
    that are [experts, in, out]; ``outside`` lists hub tensors without a place in memory
    (next-token-prediction heads).
    """

    family: str
    memory: Mapping[str, Grid]
    hub: Mapping[str, Shape]
    transposed: frozenset[str] = frozenset()
    outside: tuple[str, ...] = ()

    def prove(self) -> Layout:
        """Return the layout after checking that it is a bijection: the regions cover each value of
        every tensor in memory and on the hub once.

        Raises:
            UnsupportedConversion: naming the tensor.
        """
        on_hub: dict[str, list[tuple[str, Mapping[int, AxisRun]]]] = {}
        for key, grid in self.memory.items():
            in_memory = []
            for region in grid.regions:
                memory_runs, hub_runs = _runs(region)
                in_memory.append((region.hub, memory_runs))
                on_hub.setdefault(region.hub, []).append((key, hub_runs))
            require_cover(key, grid.shape, in_memory, self.family)
        for name, regions in on_hub.items():
            require_cover(name, self.hub[name], regions, self.family)
        return self

    @cached_property
    def places(self) -> dict[str, list[tuple[str, GridRegion]]]:
        """The tensors in memory that hold each hub tensor, with its regions there."""
        places: dict[str, list[tuple[str, GridRegion]]] = {}
        for key, grid in self.memory.items():
            for region in grid.regions:
                places.setdefault(region.hub, []).append((key, region))
        return places

    def keys(self, hub: str) -> list[str]:
        """Return the tensors in memory that hold a hub tensor."""
        return list(dict.fromkeys(key for key, _ in self.places[hub]))

    def weight(self, key: str) -> MemoryWeight:
        """Return the logical shape of a tensor in memory, and what its axes mean."""
        shape = self.memory[key].shape
        roles: tuple[Role, ...] = tuple("out" for _ in shape)  # of such only whole tensors move
        if len(shape) == 2:
            roles = ("out", "in")
        elif len(shape) == 3:
            roles = ("expert", "in", "out") if key in self.transposed else ("expert", "out", "in")
        return MemoryWeight(shape, roles, self.family)

    def parts(self, name: str, shape: Shape) -> list[HubPart]:
        """Return the hub tensors that a tensor in memory holds: a parameter, a buffer, or a sibling
        of one.

        Args:
            name: as in memory: ``experts.gate_up_proj``, ``experts.gate_up_proj.weight_scale``,
                ``experts.gate_up_proj_weight_scale``.
            shape: its shape, packed or in blocks as it is.

        Raises:
            UnsupportedConversion: an unknown name, a shape without a meaning, a seam inside a
                block.
        """
        key, leaf, joint = self.find(name)
        grid, weight = self.memory[key], self.weight(key)
        if leaf == "" and shape == grid.shape:
            return [HubPart(r.hub, region_transfer(r, self.hub[r.hub])) for r in grid.regions]
        if len(grid.shape) not in (2, 3):
            raise UnsupportedConversion(
                name, "axes", self.family, f"{list(shape)} next to a weight of {list(grid.shape)}"
            )
        axes = meaning(name, leaf, shape, weight)
        parts = []
        for region in self.members(name, leaf, grid):
            moved = transfer(name, region.axes, axes, weight, self.hub[region.hub])
            hub = region.hub if leaf == "" else sibling_name(region.hub, leaf, joint)
            parts.append(HubPart(hub, moved))
        return parts

    def members(self, name: str, leaf: str, grid: Grid) -> Iterable[GridRegion]:
        """Return the regions that a sibling belongs to: a KV scale to its own projection only.

        Raises:
            UnsupportedConversion: a KV scale without its projection.
        """
        if leaf not in KV_LEAVES or len(grid.regions) == 1:
            return grid.regions
        projection = f"{leaf[0]}_proj"
        own = [
            region
            for region in grid.regions
            if region.hub.removesuffix(".weight").rpartition(".")[2] == projection
        ]
        if not own:
            raise UnsupportedConversion(
                name, "split", self.family, f"none of its parts is called {projection}"
            )
        return own

    def find(self, name: str) -> tuple[str, str, str]:
        """Return (the weight's name in memory, the leaf or '', what joins the leaf: ``.`` or
        ``_``).

        Raises:
            UnsupportedConversion: the model has no such tensor.
        """
        if name.endswith(".weight") and name not in self.memory:
            bare = name.removesuffix(".weight")
            if bare in self.memory:
                return bare, "", "."
        return find_weight(name, self.memory, "the model", self.family)

    def hub_tensor(self, hub: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return one unquantized hub tensor; a view of memory where it is one region of one
        tensor.
        """
        shape = self.hub[hub]
        moved = [(tensors[key], region_transfer(r, shape)) for key, r in self.places[hub]]
        first = take(*moved[0])
        if tuple(first.shape) == shape:
            return first
        result = first.new_empty(shape)
        for value, place in moved:
            cut_out(result, place.hub).copy_(take(value, place))
        return result


def _runs(region: GridRegion) -> tuple[dict[int, AxisRun], dict[int, AxisRun]]:
    """Return the runs of a region by axis, in memory and on the hub."""
    memory = {a.memory: (a.start, a.step, a.length) for a in region.axes if a.memory >= 0}
    hub = {a.hub: (a.hub_start, a.hub_step, a.length) for a in region.axes if a.hub is not None}
    return memory, hub


def find_weight(
    name: str, weights: Mapping[str, object], owner: str, family: str
) -> tuple[str, str, str]:
    """Return (the weight, the leaf or '', what joins the leaf) of a tensor's name.

    Args:
        name: a weight's name, or that of a sibling: ``x.leaf`` or ``x_leaf``.
        weights: the known weights by name.
        owner: what has them, for the message.
        family: for the message.

    Raises:
        UnsupportedConversion: no weight of ``weights`` explains the name.
    """
    if name in weights:
        return name, "", "."
    head, _, leaf = name.rpartition(".")
    if leaf in SIBLINGS:
        for key in (f"{head}.weight", head):
            if key in weights:
                return key, leaf, "."
    for sibling in sorted(SIBLINGS, key=len, reverse=True):
        head = name.removesuffix(f"_{sibling}")
        if head != name and head in weights:
            return head, sibling, "_"
    raise UnsupportedConversion(name, "rename", family, f"{owner} has no such tensor")


def take(value: torch.Tensor, moved: Transfer) -> torch.Tensor:
    """Return what a transfer takes of a tensor in memory, in the hub's order; a view where it can
    be one.
    """
    return cut_out(value, moved.memory).permute(moved.order)


def cut_out(value: torch.Tensor, cuts: tuple[Cut, ...]) -> torch.Tensor:
    """Return a region of a tensor, a view."""
    return value[tuple(c.selector for c in cuts)] if cuts else value


def region_transfer(region: GridRegion, hub: Shape) -> Transfer:
    """Return the transfer of a region of an unquantized tensor: its axes need no meaning."""
    in_memory = sorted((a for a in region.axes if a.memory >= 0), key=lambda a: a.memory)
    on_hub = sorted((a for a in region.axes if a.hub is not None), key=lambda a: a.hub or 0)
    remaining = [a for a in in_memory if a.hub is not None]
    return Transfer(
        tuple(Cut(a.start, a.step, a.length, a.hub is None) for a in in_memory),
        tuple(Cut(a.hub_start, a.hub_step, a.length, a.memory < 0) for a in on_hub),
        tuple(remaining.index(a) for a in on_hub if a.memory >= 0),
        hub,
    )


def sibling_name(weight: str, leaf: str, joint: str) -> str:
    """Return the name of a weight's sibling: ``x.weight`` has ``x.leaf``, a bare ``x`` has
    ``x_leaf`` or ``x.leaf``.
    """
    if weight.endswith(".weight"):
        return f"{weight.removesuffix('.weight')}.{leaf}"
    return f"{weight}{joint}{leaf}"
