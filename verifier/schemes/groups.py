# SPDX-License-Identifier: Apache-2.0
"""Projections that engines fuse into one parameter and that therefore share format and global
scales.

Sources: ``packed_modules_mapping`` and ``stacked_params_mapping`` of vLLM 0.32's models:
``deepseek_v2.py``, ``glm4_moe_lite.py``, ``longcat_flash.py``, ``qwen3_5.py``,
``models/deepseek_v4``, ``models/minimax_m3``, and ``fp8_utils.py`` ``validate_fp8_block_shape``;
SGLang 0.5.23 and TensorRT-LLM fuse q_a with kv_a alike (NVIDIA/Model-Optimizer#582).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from verifier.schemes.formats import Format

PACKED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""What engines fuse in every family: the parameter, and the projections on disk that it takes, in
order."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """A parameter that engines build of several projections.

    Attributes:
        parameter: what they call it.
        members: the projections on disk, in order.
        families: the ``model_type`` of the families whose projections it takes; empty for all.
        engines: who builds it; empty for all.
        with_tensor_scales: the members whose per-tensor scales the loader has a place for; None
            for all.
        source: where this is written, for what a single engine does.
    """

    parameter: str
    members: tuple[str, ...]
    families: frozenset[str] = frozenset()
    engines: frozenset[str] = frozenset()
    with_tensor_scales: frozenset[str] | None = None
    source: str = ""

    def holds(self, fmt: Format, modules: Iterable[str]) -> bool:
        """Whether the parameter can hold modules in a format: a format with per-tensor scales
        needs a place for those of each.
        """
        if self.with_tensor_scales is None or not has_tensor_scales(fmt):
            return True
        return all(m.rpartition(".")[2] in self.with_tensor_scales for m in modules)


def has_tensor_scales(fmt: Format) -> bool:
    """Whether a format always has a scale of one value for the whole weight, or for its inputs."""
    return any(sibling.scalar and sibling.when == "always" for sibling in fmt.siblings)


_LATENT = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "kimi_k2",
        "kimi_k25",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "longcat_flash",
        "mistral4",
        "axk1",
        "axk2",
    }
)
_GATED_DELTA = frozenset(
    {"qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "minicpmv4_6"}
)
_MINIMAX_M3 = frozenset({"minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"})
_DEEPSEEK_V4 = frozenset({"deepseek_v4", "deepseek_v41"})
FUSIONS: tuple[Fusion, ...] = (
    *(Fusion(parameter, members) for parameter, members in PACKED.items()),
    Fusion("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa"), _LATENT),
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z"), _GATED_DELTA),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a"), _GATED_DELTA),
    Fusion("fused_wqa_wkv", ("wq_a", "wkv"), _DEEPSEEK_V4),
)
"""The fused parameters of all engines."""
ENGINE_FUSIONS: tuple[Fusion, ...] = (
    Fusion(
        "qkv_proj",
        ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
        _MINIMAX_M3,
        frozenset({"vllm"}),
        frozenset({"q_proj", "k_proj", "v_proj"}),
        "vLLM 0.32 linear.py MinimaxM3QKVParallelLinearWithIndexer, parameter.py "
        "PerTensorScaleParameter",
    ),
)
"""The fused parameters of single engines: more projections in one than others fuse."""
WHOLE_TILES = frozenset({"vllm"})
"""The engines that stop where a tile of block scales reaches into the next projection of a fused
parameter."""
_BY_LEAF: dict[str, list[Fusion]] = {}
for _fusion in FUSIONS:
    for _leaf in _fusion.members:
        _BY_LEAF.setdefault(_leaf, []).append(_fusion)


@lru_cache(maxsize=4096)
def _fusion_of(leaf: str, family: str | None) -> Fusion | None:
    fusions = _BY_LEAF.get(leaf, ())
    return next((f for f in fusions if not f.families or family in f.families), None)


def packed_name(module: str, family: str | None = None) -> str | None:
    """Return the name that an engine's fused parameter would have, or None where nothing is
    fused.

    Args:
        module: a projection on disk.
        family: the ``model_type``; None for what every family has.
    """
    head, _, leaf = module.rpartition(".")
    fusion = _fusion_of(leaf, family)
    return f"{head}.{fusion.parameter}" if fusion is not None and head else None


FUSED_PARAMETERS = frozenset(f.parameter for f in FUSIONS)


def fused_names(module: str) -> tuple[str, ...]:
    """Return the names of the fused parameters that some family's engine builds of a projection."""
    head, _, leaf = module.rpartition(".")
    return tuple(f"{head}.{f.parameter}" for f in _BY_LEAF.get(leaf, ())) if head else ()


def fused_groups(
    modules: Iterable[str], family: str | None = None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (fused name, members present) for each group with more than one member, in order of
    appearance; ``family`` as for `packed_name`.
    """
    groups: dict[str, tuple[Fusion, dict[str, str]]] = {}
    for module in modules:
        head, _, leaf = module.rpartition(".")
        fusion = _fusion_of(leaf, family)
        if fusion is not None and head:
            name = f"{head}.{fusion.parameter}"
            groups.setdefault(name, (fusion, {}))[1][leaf] = module
    for name, (fusion, found) in groups.items():
        if len(found) > 1:
            yield name, tuple(found[leaf] for leaf in fusion.members if leaf in found)


def engine_groups(
    modules: Iterable[str], family: str | None, engine: str
) -> Iterator[tuple[Fusion, tuple[str, ...]]]:
    """Yield (parameter, members present) of the groups that one engine alone fuses, where members
    that no other engine fuses are present.
    """
    fusions = [f for f in ENGINE_FUSIONS if engine in f.engines and family in f.families]
    for fusion in fusions:
        groups: dict[str, list[str]] = {}
        for module in modules:
            head, _, leaf = module.rpartition(".")
            if leaf in fusion.members and head:
                groups.setdefault(head, []).append(module)
        for members in groups.values():
            if {m.rpartition(".")[2] for m in members} - set(PACKED[fusion.parameter]):
                yield fusion, _in_order(members, fusion.members)


def split_tiles(
    rows: Mapping[str, int], tile: int, family: str | None
) -> Iterator[tuple[str, str]]:
    """Yield (projection, fused name) where a tile of block scales reaches into the projection that
    follows in the fused parameter.

    Args:
        rows: the rows of each projection.
        tile: the rows of a tile.
        family: the ``model_type``.
    """
    for name, members in fused_groups(rows, family):
        yield from ((member, name) for member in members[:-1] if rows[member] % tile)


def _in_order(modules: Iterable[str], leaves: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(modules, key=lambda m: leaves.index(m.rpartition(".")[2])))
