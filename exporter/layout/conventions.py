# SPDX-License-Identifier: Apache-2.0
"""Which hub tensor a wrongly named one is, where transformers' mapping does not say: by the field's
own spellings.

A name is reduced to what all spellings share: its tower, its layer, and the part behind it in one
vocabulary (``block_sparse_moe`` and ``mlp``; ``w1``, ``w3``, ``w2`` and ``gate_proj``, ``up_proj``,
``down_proj``). A reading counts where exactly one hub tensor has the reduced name and the shapes
fit; whether it is right, values say afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from exporter.layout.layout import Layout
from exporter.layout.pieces import Grid, Shape, concatenate, stack, whole
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
Reduced = tuple[str, str, str]


def reduced(name: str) -> Reduced:
    """Return (tower, layer, rest) of a tensor's name in one vocabulary."""
    tower = role(name.removesuffix(".weight"))
    tower = tower if tower in ("vision", "projector", "mtp") else "text"
    found = _LAYER.search(name)
    if found is None:
        return tower, "", _ROOTS.sub("", name)
    rest = _ATTENTION.sub("self_attn.", _MOE.sub("mlp.", found[2]))
    rest = rest.replace("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")
    rest = rest.replace("self_attn.indexer.", "self_attn.index_")
    if rest.startswith("mlp."):
        rest = ".".join(_LEAVES.get(part, part) for part in rest.split("."))
    return tower, found[1], rest


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
    counts = Counter(map(reduced, hub))
    places = {r: n for n in hub if counts[r := reduced(n)] == 1}
    memory: dict[str, Grid] = {}
    for name, shape in names.items():
        grid = _grid(name, shape, hub, places, family)
        if grid is not None:
            memory[name] = grid
    used = Counter(p.hub for g in memory.values() for p in g.pieces)
    twice = [n for n, c in used.items() if c > 1]
    if twice:
        both = [k for k, g in memory.items() if any(p.hub == twice[0] for p in g.pieces)]
        raise UnsupportedConversion(
            both[-1], "rename", family, f"{both[0]} would be {twice[0]} as well"
        )
    return Layout(family, memory, hub).prove()


def _grid(
    name: str, shape: Shape, hub: Mapping[str, Shape], places: Mapping[Reduced, str], family: str
) -> Grid | None:
    tower, layer, rest = reduced(name)
    suffix = ".weight" if rest.endswith(".weight") else ""
    head, _, leaf = rest.removesuffix(suffix).rpartition(".")
    try:
        if len(shape) == 3:
            grid = _stacked(places, hub, (tower, layer, head), leaf, shape[0])
        elif leaf in FUSED:
            parts = [places.get((tower, layer, f"{head}.{part}{suffix}")) for part in FUSED[leaf]]
            grid = _joined(parts, hub, 0)
        else:
            found = places.get((tower, layer, rest))
            grid = whole(found, hub[found]) if found is not None else None
    except ValueError as error:
        raise UnsupportedConversion(name, "shape", family, str(error)) from error
    if grid is not None and grid.shape != shape:
        what = ", ".join(sorted({p.hub for p in grid.pieces})[:3])
        said = f"{list(shape)}, where {what} make {list(grid.shape)}"
        raise UnsupportedConversion(name, "shape", family, said)
    return grid


def _stacked(
    places: Mapping[Reduced, str], hub: Mapping[str, Shape], where: Reduced, leaf: str, experts: int
) -> Grid | None:
    tower, layer, head = where
    rows = []
    for expert in range(experts):
        parts = [
            places.get((tower, layer, f"{head}.{expert}.{part}.weight"))
            for part in FUSED.get(leaf, (leaf,))
        ]
        row = _joined(parts, hub, 0)
        if row is None:
            return None
        rows.append(row)
    return stack(rows, 0) if rows else None


def _joined(parts: Iterable[str | None], hub: Mapping[str, Shape], dim: int) -> Grid | None:
    found = [whole(p, hub[p]) for p in parts if p is not None]
    return concatenate(found, dim) if found and len(found) == len(list(parts)) else None
