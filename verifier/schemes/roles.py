# SPDX-License-Identifier: Apache-2.0
"""What a module is for, derived from its hub name: routed expert, attention, router, norm …"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from sys import intern

ROLES = (
    "mtp",
    "vision",
    "projector",
    "routed_expert",
    "shared_expert",
    "router",
    "indexer",
    "norm",
    "attention",
    "embedding",
    "lm_head",
    "mlp",
    "other",
)
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        (
            "projector",
            r"(^|\.)(multi_modal_projector|mm_projector|patch_merge_mlp|merger|embed_vision)(\.|$)",
        ),
        (
            "vision",
            r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|vision|sam_model|qwen2_model|audio_tower|audio_encoder"
            r"|speech|code2wav)(\.|$)",
        ),
        ("mtp", r"(^|\.)(mtp|nextn)(\.|$)"),
        (
            "routed_expert",
            r"\.experts(\.\d+)?\.(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3|w13)$"
            # stacks
            r"|\.experts\.fc[12]$|\.block_sparse_moe\.(input|output)_linear$"
            r"|\.moe\.(gate|up|down)_proj$",
        ),
        ("shared_expert", r"\.shared_experts?\."),
        ("norm", r"(norm|layernorm|ln_f|layrnorm)(\d*)$|_norm\.|\.norm$"),
        ("indexer", r"\.(indexer\.|index_[qk]_(proj|norm))"),
        (
            "router",
            r"\.(gate|router|shared_expert_gate|e_score_correction_bias)(\.(proj|layer|classifier|e_score_correction_bias))?$",
        ),
        ("attention", r"\.(self_attn|attn|attention|linear_attn)\."),
        ("embedding", r"(^|\.)(embed_tokens|wte|word_embeddings|embeddings)$"),
        ("lm_head", r"(^|\.)(lm_head|head|output)$"),
        ("mlp", r"\.(mlp|feed_forward|ffn|block_sparse_moe)\."),
    )
)
_EXPERT = re.compile(r"^(?P<container>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def stem(module: str) -> str:
    """Return a name with the number of its routed expert as 0: one string for all experts of a
    projection. The role, the layer and the container of a name are those of its stem.
    """
    head, found, tail = module.rpartition(".experts.")
    number, _, leaf = tail.partition(".")
    return intern(f"{head}.experts.0.{leaf}") if found and leaf and number.isdigit() else module


@lru_cache(maxsize=1 << 18)
def role(module: str) -> str:
    """Return the role of a module name (one of `ROLES`)."""
    # No pattern depends on a number, and names differ mostly in their numbers.
    return _role(_NUMBER.sub("0", module))


@lru_cache(maxsize=4096)
def _role(module: str) -> str:
    for name, pattern in _PATTERNS:
        if pattern.search(module):
            return name
    return "other"


@dataclass(frozen=True, slots=True)
class ExpertKey:
    """A projection of a routed expert: ``container`` ends in ``.experts``."""

    container: str
    expert: int
    leaf: str


@lru_cache(maxsize=1 << 18)
def expert_key(module: str) -> ExpertKey | None:
    """Return which routed expert's projection a module is, or None."""
    match = _EXPERT.match(module)
    if match is None:
        return None
    return ExpertKey(match["container"], int(match["expert"]), match["leaf"])


def layer_of(name: str) -> int | None:
    """Return the layer number in a name (the last one where towers nest), or None."""
    found = _LAYER.findall(name)
    return int(found[-1]) if found else None


def collapse(name: str) -> str:
    """Return a name with its layer and expert numbers replaced by ``*``."""
    return _NUMBER.sub("*", name)
