# SPDX-License-Identifier: Apache-2.0
"""Which hub tensor a wrongly named tensor is, by the field's own spellings, where transformers'
mapping does not cover it.

A name is reduced to what all spellings share: its tower, its layer, and the rest in one vocabulary
(``block_sparse_moe`` and ``mlp``; ``w1``, ``w3``, ``w2`` and ``gate_proj``, ``up_proj``,
``down_proj``). A reading counts where exactly one hub tensor has the reduced name and the shapes
fit; values decide later whether it is right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from exporter.layout.grids import Grid, Shape, concatenate, stack, whole
from exporter.layout.layout import Layout
from verifier.errors import UnsupportedConversion
from verifier.schemes import PACKED, role

FUSED: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("gate_proj", "up_proj"),
    "qkv_proj": PACKED["qkv_proj"],
}
"""Fused leaves and their parts, in reduced names."""
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_ROOTS = re.compile(r"^((model|language_model|text_model|transformer|backbone|decoder|encoder)\.)+")
_MOE = re.compile(r"^(block_sparse_moe|feed_forward|ffn|moe)\.")
_ATTENTION = re.compile(r"^(attn|attention|self_attention)\.")


class ReducedName(NamedTuple):
    """A tensor's name in one vocabulary; ``layer`` is '' outside the layers."""

    tower: str
    layer: str
    rest: str


def reduced(name: str) -> ReducedName:
    """Return a tensor's name in one vocabulary."""
    tower = role(name.removesuffix(".weight"))
    tower = tower if tower in ("vision", "projector", "mtp") else "text"
    match = _LAYER.search(name)
    if match is None:
        return ReducedName(tower, "", _ROOTS.sub("", name))
    rest = _ATTENTION.sub("self_attn.", _MOE.sub("mlp.", match[2]))
    rest = rest.replace("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")
    rest = rest.replace("self_attn.indexer.", "self_attn.index_")
    if rest.startswith("mlp."):
        rest = ".".join(_LEAVES.get(part, part) for part in rest.split("."))
    return ReducedName(tower, match[1], rest)


def by_convention(names: Mapping[str, Shape], hub: Mapping[str, Shape], family: str) -> Layout:
    """Return the layout of those wrongly named weights that the field's spellings explain.

    Args:
        names: logical shapes of the weights that have no hub name, by their name.
        hub: logical shapes of the hub's weights.
        family: for messages.

    Raises:
        UnsupportedConversion: a reading that the shapes contradict, or two names for one hub
            tensor.
    """
    conventions = _Conventions(hub)
    memory: dict[str, Grid] = {}
    for name, shape in names.items():
        try:
            grid = conventions.grid(name, shape)
        except ValueError as error:
            raise UnsupportedConversion(name, "shape", family, str(error)) from error
        if grid is not None:
            memory[name] = grid
    uses = Counter(region.hub for grid in memory.values() for region in grid.regions)
    ambiguous = next((hub for hub, count in uses.items() if count > 1), None)
    if ambiguous is not None:
        keys = [k for k, g in memory.items() if any(r.hub == ambiguous for r in g.regions)]
        raise UnsupportedConversion(
            keys[-1], "rename", family, f"{keys[0]} would become {ambiguous} as well"
        )
    return Layout(family, memory, hub).prove()


class _Conventions:
    """The hub tensors by their reduced names, where one tensor alone has that name."""

    def __init__(self, hub: Mapping[str, Shape]) -> None:
        by_name: dict[ReducedName, list[str]] = {}
        for name in hub:
            by_name.setdefault(reduced(name), []).append(name)
        self._hub = hub
        self._unique = {key: names[0] for key, names in by_name.items() if len(names) == 1}

    def grid(self, name: str, shape: Shape) -> Grid | None:
        """Return the hub tensors that a weight consists of, None where no spelling explains it.

        Raises:
            ValueError: the shapes contradict the reading.
        """
        tower, layer, rest = reduced(name)
        suffix = ".weight" if rest.endswith(".weight") else ""
        head, _, leaf = rest.removesuffix(suffix).rpartition(".")
        if len(shape) == 3:
            grid = self._stacked(ReducedName(tower, layer, head), leaf, shape[0])
        else:
            parts = [f"{head}.{part}{suffix}" for part in FUSED[leaf]] if leaf in FUSED else [rest]
            grid = self._joined(ReducedName(tower, layer, part) for part in parts)
        if grid is not None and grid.shape != shape:
            names = ", ".join(sorted({region.hub for region in grid.regions})[:3])
            raise ValueError(f"{list(shape)}, where {names} make {list(grid.shape)}")
        return grid

    def _stacked(self, container: ReducedName, leaf: str, experts: int) -> Grid | None:
        tower, layer, head = container
        rows = []
        for expert in range(experts):
            parts = [f"{head}.{expert}.{part}.weight" for part in FUSED.get(leaf, (leaf,))]
            row = self._joined(ReducedName(tower, layer, part) for part in parts)
            if row is None:
                return None
            rows.append(row)
        return stack(rows, 0) if rows else None

    def _joined(self, keys: Iterable[ReducedName]) -> Grid | None:
        grids = []
        for key in keys:
            name = self._unique.get(key)
            if name is None:
                return None
            grids.append(whole(name, self._hub[name]))
        return concatenate(grids, 0) if len(grids) > 1 else grids[0]
