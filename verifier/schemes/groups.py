# SPDX-License-Identifier: Apache-2.0
"""Projections that engines fuse into one parameter and that therefore share global scales and
format.

Sources: ``packed_modules_mapping`` in vLLM 0.32 (qkv_proj, gate_up_proj, w13; MiniMax-M3's sparse
layers fuse the indexer's projections in as well, for the format only).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

PACKED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""The engine's fused parameter and the projections on disk that it takes, in order."""
_PACKED_OF = {leaf: packed for packed, leaves in PACKED.items() for leaf in leaves}


def packed_name(module: str) -> str | None:
    """Return the name that an engine's fused parameter would have, or None where nothing is
    fused.
    """
    head, _, leaf = module.rpartition(".")
    packed = _PACKED_OF.get(leaf)
    return f"{head}.{packed}" if packed and head else None


def fused_groups(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (fused name, members present) for each group with more than one member, in order of
    appearance.
    """
    found: dict[str, list[str]] = {}
    for module in modules:
        packed = packed_name(module)
        if packed:
            found.setdefault(packed, []).append(module)
    for packed, members in found.items():
        if len(members) > 1:
            order = PACKED[packed.rpartition(".")[2]]
            yield packed, tuple(sorted(members, key=lambda m: order.index(m.rpartition(".")[2])))
