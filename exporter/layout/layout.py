# SPDX-License-Identifier: Apache-2.0
"""One model's layout: which tensors in memory are which hub tensors, siblings included, in both
directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from exporter.layout import hf_mapping
from exporter.layout.pieces import Grid, Piece, Run, Shape, cover
from exporter.layout.siblings import SIBLINGS, Cut, Role, Transfer, meaning, transfer
from verifier.errors import UnsupportedConversion
from verifier.schemes import KV_LEAVES

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """A hub tensor, or a region of one, made of a tensor in memory."""

    hub: str
    transfer: Transfer


@dataclass(frozen=True)
class Layout:
    """Tensors in memory by name, as grids of hub tensors.

    ``hub`` gives the logical shape of each hub weight; ``transposed`` names the stacks in memory
    that are [expert, in, out]; ``outside`` are hub tensors that have no place in memory
    (next-token-prediction heads).
    """

    family: str
    memory: Mapping[str, Grid]
    hub: Mapping[str, Shape]
    transposed: frozenset[str] = frozenset()
    outside: tuple[str, ...] = field(default=())

    def prove(self) -> Layout:
        """Return self, held to what a layout is: each value of every tensor at either end is
        covered once.

        Raises:
            UnsupportedConversion: naming the tensor.
        """
        there: dict[str, list[tuple[str, Mapping[int, Run]]]] = {}
        for key, grid in self.memory.items():
            here = []
            for p in grid.pieces:
                here.append(
                    (
                        p.hub,
                        {a.memory: (a.start, a.step, a.length) for a in p.axes if a.memory >= 0},
                    )
                )
                runs = {
                    a.hub: (a.hub_start, a.hub_step, a.length) for a in p.axes if a.hub is not None
                }
                there.setdefault(p.hub, []).append((key, runs))
            cover(key, grid.shape, here, self.family)
        for name, regions in there.items():
            cover(name, self.hub[name], regions, self.family)
        return self

    @cached_property
    def _places(self) -> dict[str, list[tuple[str, Piece]]]:
        found: dict[str, list[tuple[str, Piece]]] = {}
        for key, grid in self.memory.items():
            for p in grid.pieces:
                found.setdefault(p.hub, []).append((key, p))
        return found

    def roles(self, key: str) -> tuple[Role, ...]:
        """Return what the axes of a tensor in memory mean."""
        rank = len(self.memory[key].shape)
        if rank == 3:
            return ("expert", "in", "out") if key in self.transposed else ("expert", "out", "in")
        if rank == 2:
            return ("out", "in")
        return tuple("out" for _ in range(rank))  # of other ranks only whole tensors move

    def parts(self, name: str, shape: Shape) -> list[Part]:
        """Return the hub tensors that a tensor in memory is made of: a parameter, a buffer, or a
        sibling of one.

        Args:
            name: as in memory: ``experts.gate_up_proj``, ``experts.gate_up_proj.weight_scale``,
                ``experts.gate_up_proj_weight_scale``.
            shape: its shape, packed or in blocks as it is.

        Raises:
            UnsupportedConversion: a name without a place, a shape without a meaning, a seam inside
                a block.
        """
        key, leaf, spelled = self.find(name)
        grid = self.memory[key]
        if leaf == "" and shape == grid.shape:
            return [Part(p.hub, _plain(p, self.hub[p.hub])) for p in grid.pieces]
        roles = self.roles(key)
        if len(grid.shape) not in (2, 3):
            raise UnsupportedConversion(
                name, "axes", self.family, f"{list(shape)} beside a weight of {list(grid.shape)}"
            )
        found = meaning(name, leaf, shape, grid.shape, roles, self.family)
        parts = []
        for p in self._members(name, leaf, grid):
            hub = self.hub[p.hub]
            moved = transfer(
                name, p.axes, found, shape, roles, grid.shape, hub, self.family, hub_rank=len(hub)
            )
            parts.append(Part(p.hub if leaf == "" else _sibling(p.hub, leaf, spelled), moved))
        return parts

    def _members(self, name: str, leaf: str, grid: Grid) -> Iterable[Piece]:
        """Return the pieces that a sibling belongs to: a KV scale to its own projection only."""
        if leaf not in KV_LEAVES or len(grid.pieces) == 1:
            return grid.pieces
        own = [
            p
            for p in grid.pieces
            if p.hub.removesuffix(".weight").rpartition(".")[2] == f"{leaf[0]}_proj"
        ]
        if not own:
            raise UnsupportedConversion(
                name, "split", self.family, f"none of its parts is called {leaf[0]}_proj"
            )
        return own

    def find(self, name: str) -> tuple[str, str, str]:
        """Return (the weight's name in memory, the leaf or '', how the leaf is joined to it: ``.``
        or ``_``).

        Raises:
            UnsupportedConversion: no such tensor in the model.
        """
        if name in self.memory:
            return name, "", "."
        head, _, leaf = name.rpartition(".")
        if leaf == "weight" and head in self.memory:
            return head, "", "."
        if leaf in SIBLINGS:
            for key in (f"{head}.weight", head):
                if key in self.memory:
                    return key, leaf, "."
        for sibling in sorted(SIBLINGS, key=len, reverse=True):
            head = name.removesuffix(f"_{sibling}")
            if head != name and head in self.memory:
                return head, sibling, "_"
        raise UnsupportedConversion(
            name, "rename", self.family, "the model has no such tensor; no name is made up"
        )

    def keys(self, hub: str) -> list[str]:
        """Return the tensors in memory that a hub tensor is made of."""
        return list(dict.fromkeys(key for key, _ in self._places[hub]))

    def hub_tensor(self, hub: str, tensors: Tensors) -> torch.Tensor:
        """Return one unquantized hub tensor; a view of memory where it is one region of one
        tensor.
        """
        places, shape = self._places[hub], self.hub[hub]
        first = take(tensors[places[0][0]], _plain(places[0][1], shape))
        if tuple(first.shape) == shape:
            return first
        result = first.new_empty(shape)
        for key, piece in places:
            moved = _plain(piece, shape)
            _slot(result, moved.hub).copy_(take(tensors[key], moved))
        return result

    def to_hub(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return the hub tensors of tensors in memory, each with storage of its own.

        Raises:
            UnsupportedConversion: what cannot be converted, by name; colliding names; a hub tensor
                that is left unfilled.
        """
        found: dict[str, torch.Tensor] = {}
        filled: dict[str, int] = {}
        for name, value in tensors.items():
            for part in self.parts(name, tuple(value.shape)):
                moved = take(value, part.transfer)
                if part.transfer.hub_shape == moved.shape:
                    if part.hub in found:
                        raise UnsupportedConversion(
                            part.hub, "rename", self.family, f"{name} and another tensor become it"
                        )
                    found[part.hub] = moved.clone(memory_format=torch.contiguous_format)
                else:
                    target = found.setdefault(part.hub, value.new_empty(part.transfer.hub_shape))
                    _slot(target, part.transfer.hub).copy_(moved)
                filled[part.hub] = filled.get(part.hub, 0) + moved.numel()
        for hub, count in filled.items():
            if count != found[hub].numel():
                raise UnsupportedConversion(
                    hub, "element count", self.family, f"{count:,} of {found[hub].numel():,} values"
                )
        return found

    def to_memory(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return the tensors in memory of hub tensors; the inverse of `to_hub`.

        A scalar that every part has becomes one scalar where the parts are joined along an axis
        (they must agree), and a vector over the experts of a stack.

        Raises:
            UnsupportedConversion: what cannot be converted, by name; parts that are missing or do
                not agree.
        """
        found: dict[str, torch.Tensor] = {}
        for (key, leaf, spelled), values in self._grouped(tensors).items():
            name = key if leaf == "" else _sibling(key, leaf, spelled)
            found[name] = self._joined(name, key, leaf, values)
        return found

    def _grouped(
        self, tensors: Tensors
    ) -> dict[tuple[str, str, str], list[tuple[Piece, torch.Tensor]]]:
        groups: dict[tuple[str, str, str], list[tuple[Piece, torch.Tensor]]] = {}
        for name, value in tensors.items():
            weight, leaf, spelled = self._hub_weight(name)
            for key, piece in self._places[weight]:
                groups.setdefault((key, leaf, spelled), []).append((piece, value))
        return groups

    def _hub_weight(self, name: str) -> tuple[str, str, str]:
        if name in self._places:
            return name, "", "."
        head, _, leaf = name.rpartition(".")
        if leaf in SIBLINGS:
            for key in (f"{head}.weight", head):
                if key in self._places:
                    return key, leaf, "."
        for sibling in sorted(SIBLINGS, key=len, reverse=True):
            head = name.removesuffix(f"_{sibling}")
            if head != name and head in self._places:
                return head, sibling, "_"
        raise UnsupportedConversion(
            name, "rename", self.family, "the hub layout has no such tensor; no name is made up"
        )

    def _joined(
        self, name: str, key: str, leaf: str, values: list[tuple[Piece, torch.Tensor]]
    ) -> torch.Tensor:
        grid = self.memory[key]
        shape = self._memory_shape(name, key, leaf, values)
        parts = {(p.hub, id(p)): p for p in self._members(name, leaf, grid)}
        if len(values) != len(parts):
            raise UnsupportedConversion(
                name, "join", self.family, f"{len(values)} of its {len(parts)} parts are here"
            )
        result = values[0][1].new_empty(shape)
        roles, done = self.roles(key), torch.zeros(shape, dtype=torch.bool)
        for piece, value in values:
            hub = self.hub[piece.hub]
            if leaf == "" and shape == grid.shape:
                moved = _plain(piece, hub)
            else:
                found = meaning(name, leaf, shape, grid.shape, roles, self.family)
                moved = transfer(
                    name,
                    piece.axes,
                    found,
                    shape,
                    roles,
                    grid.shape,
                    hub,
                    self.family,
                    hub_rank=len(hub),
                )
            if tuple(value.shape) != moved.hub_shape:
                said = f"{list(value.shape)} on the hub, where {list(moved.hub_shape)} belongs"
                raise UnsupportedConversion(name, "join", self.family, said)
            region, seen = _region(result, moved), _region(done, moved)
            incoming = _slot(value, moved.hub).permute(_inverse(moved.order)).reshape(region.shape)
            if bool(seen.any()) and not torch.equal(_raw(region), _raw(incoming)):
                raise UnsupportedConversion(
                    name, "join", self.family, f"its parts differ in {leaf}; {piece.hub} is another"
                )
            region.copy_(incoming)
            seen.fill_(True)
        if not bool(done.all()):
            raise UnsupportedConversion(name, "element count", self.family, "its parts leave a gap")
        return result

    def _memory_shape(
        self, name: str, key: str, leaf: str, values: list[tuple[Piece, torch.Tensor]]
    ) -> Shape:
        """Return the shape in memory of a tensor whose parts have the shapes that they have on the
        hub.
        """
        grid, (piece, value) = self.memory[key], values[0]
        hub = self.hub[piece.hub]
        if leaf == "" and tuple(value.shape) == hub:
            return grid.shape
        roles = self.roles(key)
        on_hub = {a.hub: roles[a.memory] for a in piece.axes if a.hub is not None and a.memory >= 0}
        order = tuple(on_hub.get(i, "expert") for i in range(len(hub)))
        found = meaning(name, leaf, tuple(value.shape), hub, order, self.family)
        sizes = dict(zip(roles, grid.shape, strict=True))
        blocks: dict[Role, int] = dict(zip(found.roles, found.blocks, strict=True))
        ones = sum(r == "one" for r in found.roles)
        stacked = "expert" in roles and "expert" not in order
        kept = [r for r in roles if r in found.roles or (r == "expert" and stacked)]
        return (*(-(-sizes[r] // blocks.get(r, 1)) for r in kept), *(1 for _ in range(ones)))


def of_model(model: Any, hub: Mapping[str, Shape] | None = None) -> Layout:
    """Return the proved layout of a transformers model.

    Args:
        model: on any device, also the meta device; its class and config decide, its values do not.
        hub: names and logical shapes of the weights of the hub checkpoint that it was loaded from.
            They decide where transformers' mapping is no bijection; without them what
            `save_pretrained` would write is taken.

    Raises:
        UnsupportedConversion: an operation that is not known, names that collide, a tensor of the
            model that no hub tensor fills; naming key, operation and family.
    """
    from exporter.detect import detect  # noqa: PLC0415  (detect imports transformers)

    family = hf_mapping.family_of(model)
    found = dict(hub) if hub is not None else hf_mapping.hub_names(model)
    grids, outside = hf_mapping.grids(model, found)
    missing = [k for k in hf_mapping.saved(model) if k not in grids]
    if missing:
        said = (
            f"no hub tensor becomes it ({len(missing):,} such); give the source checkpoint's names"
        )
        raise UnsupportedConversion(missing[0], "rename", family, said)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for key, grid in grids.items():
        if grid.shape != state[key]:
            said = f"becomes {list(grid.shape)}, and the model has {list(state[key])}"
            raise UnsupportedConversion(key, "shape", family, said)
    stacks = [s for s in detect(model).stacks if s.transposed]
    transposed = frozenset(f"{s.path}.{p}" for s in stacks for p in (s.first, s.down))
    names = {n: s for n, s in found.items() if n not in outside}
    return Layout(family, grids, names, transposed, tuple(outside)).prove()


def take(value: torch.Tensor, moved: Transfer) -> torch.Tensor:
    """Return what a transfer takes of a tensor in memory, in the hub's order; a view where it can
    be one.
    """
    return _region(value, moved).permute(moved.order)


def _region(value: torch.Tensor, moved: Transfer) -> torch.Tensor:
    return _slot(value, moved.memory)


def _slot(value: torch.Tensor, cuts: tuple[Cut, ...]) -> torch.Tensor:
    at: list[slice | int] = [
        c.start if c.drop else slice(c.start, c.start + (c.length - 1) * c.step + 1, c.step)
        for c in cuts
    ]
    return value[tuple(at)] if at else value


def _raw(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    found = [0] * len(order)
    for i, o in enumerate(order):
        found[o] = i
    return tuple(found)


def _plain(piece: Piece, hub: Shape) -> Transfer:
    """Return the transfer of a piece of an unquantized tensor: its axes need no meaning."""
    inside = sorted((a for a in piece.axes if a.memory >= 0), key=lambda a: a.memory)
    cuts = tuple(Cut(a.start, a.step, a.length, a.hub is None) for a in inside)
    kept = [a for a in inside if a.hub is not None]
    ranked = sorted((a for a in piece.axes if a.hub is not None), key=lambda a: a.hub or 0)
    order = tuple(kept.index(a) for a in ranked if a.memory >= 0)
    there = tuple(Cut(a.hub_start, a.hub_step, a.length, a.memory < 0) for a in ranked)
    return Transfer(cuts, there, order, hub)


def _sibling(weight: str, leaf: str, spelled: str) -> str:
    """Return a sibling's name beside a weight: ``x.weight`` has ``x.leaf``, a bare ``x`` has
    ``x_leaf`` or ``x.leaf``.
    """
    if weight.endswith(".weight"):
        return f"{weight.removesuffix('.weight')}.{leaf}"
    return f"{weight}{spelled}{leaf}"
