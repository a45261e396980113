# SPDX-License-Identifier: Apache-2.0
"""What engines need to load a family besides its tensors, as data with the source of each entry:
names by which they ask for a module, heads that have no tensor, fields of config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verifier.schemes import Engine, expert_key, role

HEAD = "lm_head"
"""The name by which every engine finds the output head: alone, as a part or as a substring."""
_MINIMAX_M3 = frozenset({"minimax_m3_vl"})


@dataclass(frozen=True, slots=True)
class AskedName:
    """A module that an engine looks up in the declaration by a name that is not on disk.

    Attributes:
        engine: who asks.
        families: the ``model_type`` of the families.
        stored: how the module's name on disk ends; for experts, the name of all of a layer.
        asked: how the name ends that the engine asks by; '' where it asks without a name, so that
            no exclusion can match.
        source: where this is written.
    """

    engine: Engine
    families: frozenset[str]
    stored: str
    asked: str
    source: str

    def in_full(self, module: str) -> str:
        """Return the whole name by which the engine asks for a module on disk, '' for none."""
        return _as_asked(module).removesuffix(self.stored) + self.asked if self.asked else ""


@dataclass(frozen=True, slots=True)
class RequiredField:
    """A field of config.json that an engine reads and that transformers spells differently.

    Attributes:
        engine: who reads it.
        families: the ``model_type`` of the families.
        path: its dotted path.
        effect: what the engine does without it.
        source: where this is written.
    """

    engine: Engine
    families: frozenset[str]
    path: str
    effect: str
    source: str

    def present(self, config: Mapping[str, Any]) -> bool:
        """Whether a config has the field."""
        node: Any = config
        for part in self.path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return False
            node = node[part]
        return True


@dataclass(frozen=True, slots=True)
class UnreadFormat:
    """A format that an engine reads, but not in these families.

    Attributes:
        engine: who does not load it.
        families: the ``model_type`` of the families.
        format: its name in `verifier.schemes.FORMATS`.
        why: what the engine does with it.
        source: where this is written.
    """

    engine: Engine
    families: frozenset[str]
    format: str
    why: str
    source: str


@dataclass(frozen=True, slots=True)
class UnreadKvScales:
    """KV scales that an engine does not read, although it quantizes the cache.

    Attributes:
        engine: who does not read them.
        families: the ``model_type`` of the families.
        layers: which layers' scales.
        source: where this is written.
    """

    engine: Engine
    families: frozenset[str]
    layers: str
    source: str


ASKED_NAMES: tuple[AskedName, ...] = (
    AskedName(
        "vllm",
        frozenset({"phimoe"}),
        "block_sparse_moe.gate",
        "mlp.router",
        "vLLM 0.32 builds PhimoeForCausalLM of transformers' modules",
    ),
    AskedName(
        "vllm",
        frozenset({"exaone_moe", "afmoe"}),
        "lm_head",
        "",
        "vLLM 0.32 exaone_moe.py and afmoe.py build ParallelLMHead without a prefix",
    ),
    AskedName(
        "vllm",
        frozenset({"axk2"}),
        "self_attn.q_b_proj",
        "self_attn.q_gate_proj",
        "vLLM 0.32 builds AXK2ForCausalLM of transformers' modules",
    ),
    AskedName(
        "vllm",
        frozenset({"minimax_m2"}),
        "block_sparse_moe.experts",
        "mlp.experts",
        "vLLM 0.32 minimax_m2.py, run on a CPU",
    ),
    *(
        AskedName(
            "vllm",
            frozenset({"longcat_flash"}),
            stored,
            "fused_qkv_a_proj",
            "vLLM 0.32 longcat_flash.py has no packed_modules_mapping of it",
        )
        for stored in ("q_a_proj", "kv_a_proj_with_mqa")
    ),
)
REQUIRED_FIELDS: tuple[RequiredField, ...] = (
    RequiredField(
        "vllm",
        _MINIMAX_M3,
        "vision_config.img_token_compression_config",
        "stops: the vision tower has no attribute img_token_compression_config",
        "vLLM 0.32 models/minimax_m3/common/vision_tower.py, run on a CPU",
    ),
    RequiredField(
        "vllm",
        _MINIMAX_M3,
        "text_config.sparse_attention_config",
        "builds the indexer of the released model: in all layers from the fourth on",
        "vLLM 0.32 transformers_utils/configs/minimax_m3.py",
    ),
    RequiredField(
        "vllm",
        _MINIMAX_M3,
        "text_config.moe_layer_freq",
        "builds the layers of the released model: 3 dense, the others with experts",
        "vLLM 0.32 transformers_utils/configs/minimax_m3.py",
    ),
)


UNREAD_FORMATS: tuple[UnreadFormat, ...] = (
    UnreadFormat(
        "vllm",
        _MINIMAX_M3,
        "fp8_block",
        "its loader renames weight_scale_inv to weight_scale, and every block scale stays unset",
        "vLLM 0.32 models/minimax_m3/nvidia/model.py, run on a CPU",
    ),
)
UNREAD_KV_SCALES: tuple[UnreadKvScales, ...] = (
    UnreadKvScales(
        "vllm",
        _MINIMAX_M3,
        "layers with sparse attention",
        "vLLM 0.32 models/minimax_m3/nvidia/model.py, run on a CPU",
    ),
)


def untensored_heads(modules: Iterable[str], config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the heads that engines build although no tensor of theirs is stored: the output head
    of a model that ties it to the embedding.

    Args:
        modules: the stored modules, or their stems.
        config: config.json; a model whose config unties the head has a different one.
    """
    text = (config or {}).get("text_config")
    levels = (config or {}, text if isinstance(text, Mapping) else {})
    flags = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
    roles = {role(name) for name in modules}
    untied = bool(flags) and not any(flags)
    return (HEAD,) if "embedding" in roles and "lm_head" not in roles and not untied else ()


def asked_names(module: str, family: str | None, engines: Iterable[Engine]) -> Iterator[AskedName]:
    """Yield the names by which engines ask for a module, where they are not the one on disk."""
    for name in ASKED_NAMES:
        if name.engine in engines and family in name.families:
            whole = _as_asked(module)
            if whole == name.stored or whole.endswith(f".{name.stored}"):
                yield name


def all_asked_names(
    modules: Iterable[str], family: str | None, engines: Iterable[Engine]
) -> frozenset[str]:
    """Return the whole names by which engines ask for some modules, where they are not those on
    disk; '' where they ask without a name.
    """
    readers = frozenset(engines)
    if not any(n.engine in readers and family in n.families for n in ASKED_NAMES):
        return frozenset()
    return frozenset(n.in_full(m) for m in modules for n in asked_names(m, family, readers))


def _as_asked(module: str) -> str:
    """Return the name of all experts of a layer for one of them; engines ask for all at once."""
    expert = expert_key(module)
    return expert.container if expert is not None else module


def unread_formats(
    formats: Iterable[str], family: str | None, engines: Iterable[Engine]
) -> Iterator[UnreadFormat]:
    """Yield what keeps engines from loading the formats of a checkpoint of a family."""
    names, readers = set(formats), set(engines)
    for unread in UNREAD_FORMATS:
        if unread.format in names and family in unread.families and unread.engine in readers:
            yield unread


def unread_kv_scales(family: str | None, engines: Iterable[Engine]) -> Iterator[UnreadKvScales]:
    """Yield the KV scales of a family that engines do not read."""
    readers = set(engines)
    for unread in UNREAD_KV_SCALES:
        if family in unread.families and unread.engine in readers:
            yield unread
