# SPDX-License-Identifier: Apache-2.0
"""Write ``verifier/layouts/families/*.json``: the hub layout of each family, from what transformers
itself saves.

    python tools/make_families.py [--check]

For each family two small models with different, telling dimensions are saved by
``save_pretrained``; names become patterns, and each dimension the shortest product of config values
that explains both. ``--check`` writes nothing and fails where a committed file differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from verifier.layouts.family import Family

OUT = Path(__file__).parent.parent / "verifier" / "layouts" / "families"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LAYER_KINDS = {"all", "sparse", "dense", "indexer"}


NUMBERS = {
    "vocab_size": (331, 337),
    "hidden_size": (114, 130),
    "intermediate_size": (208, 232),
    "num_attention_heads": (6, 10),
    "num_key_value_heads": (2, 5),
    "num_local_experts": (7, 9),
    "num_experts": (7, 9),
    "n_routed_experts": (14, 18),
    "moe_num_experts": (7, 9),
    "moe_intermediate_size": (40, 56),
    "shared_expert_intermediate_size": (88, 136),
    "n_shared_experts": (3, 2),
    "moe_num_shared_experts": (3, 2),
    "q_lora_rank": (34, 38),
    "kv_lora_rank": (22, 26),
    "qk_nope_head_dim": (44, 46),
    "qk_rope_head_dim": (12, 20),
    "v_head_dim": (52, 58),
    "num_experts_per_tok": (2, 2),
    "moe_k": (2, 2),
    "n_group": (2, 2),
    "topk_group": (1, 1),
}
"""Two telling values for each config key that decides a shape."""


def text_model(model_type: str, *, own_head_dim: bool = True, **more: Any) -> Any:
    """Return the config function of a text family: `NUMBERS` where its config has the key, and
    ``more``.

    ``own_head_dim`` says whether its classes take a ``head_dim`` that is not hidden size / heads.
    """

    def config(v: int) -> Any:
        base = transformers.AutoConfig.for_model(model_type)
        given: dict[str, Any] = {k: n[v] for k, n in NUMBERS.items() if hasattr(base, k)}
        if own_head_dim and "kv_lora_rank" not in given:
            given["head_dim"] = (24, 28)[v]  # classes without the key take it all the same
        given |= {
            k: 0 for k in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(base, k)
        }
        given |= {"num_hidden_layers": 3, "tie_word_embeddings": False} | more
        return transformers.AutoConfig.for_model(model_type, **given)

    return config


def minimax_m3_vl(v: int) -> Any:
    """Return a MiniMax-M3 config: dense first layer, one sparse layer without an indexer, one
    with.
    """
    text = {
        "vocab_size": (331, 337)[v],
        "hidden_size": (114, 130)[v],
        "intermediate_size": (40, 56)[v],
        "dense_intermediate_size": (208, 232)[v],
        "shared_intermediate_size": (88, 136)[v],
        "num_hidden_layers": 3,
        "num_attention_heads": (6, 10)[v],
        "num_key_value_heads": (2, 5)[v],
        "head_dim": (24, 28)[v],
        "rotary_dim": 8,
        "num_local_experts": (7, 9)[v],
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"],
        "index_n_heads": (3, 4)[v],
        "index_head_dim": (23, 29)[v],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "image_size": 84,
        "patch_size": 7,
        "temporal_patch_size": (2, 3)[v],
        "spatial_merge_size": (3, 2)[v],
        "hidden_size": (72, 84)[v],
        "intermediate_size": (152, 184)[v],
        "num_hidden_layers": 2,
        "num_attention_heads": (3, 6)[v],
        "num_channels": (5, 4)[v],
    }
    return transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=3,
        video_token_index=4,
        projector_hidden_size=(116, 124)[v],
    )


MORE_NUMBERS = {
    "num_hidden_layers": (3, 3),
    "head_dim": (24, 28),
    "num_shared_experts": (3, 2),
    "first_k_dense_replace": (1, 1),
    "num_dense_layers": (1, 1),
    "mlp_layer_types": (["dense", "sparse", "sparse"],) * 2,
    "num_experts_per_token": (2, 2),
    "shared_intermediate_size": (88, 136),
    "shared_experts_intermediate_size": (88, 136),
    "share_expert_dim": (88, 136),
    "moe_shared_expert_intermediate_size": (88, 136),
    "dense_intermediate_size": (216, 248),
    "moe_topk": (2, 2),
    "intermediate_size_mlp": (216, 248),
    "expert_ffn_hidden_size": (40, 56),
    "ffn_hidden_size": (208, 232),
    "o_lora_rank": (36, 42),
    "o_groups": (2, 2),
    "index_head_dim": (62, 74),
    "index_n_heads": (3, 4),
    "index_topk": (8, 8),
    "num_expert_group": (2, 2),
    "linear_num_heads": (11, 13),
    "linear_head_dim": (32, 36),
    "linear_key_head_dim": (12, 20),
    "linear_num_key_heads": (3, 4),
    "linear_num_value_heads": (15, 12),
    "linear_value_head_dim": (18, 22),
    "linear_conv_kernel_dim": (3, 5),
    "mamba_d_conv": (3, 5),
    "conv_kernel": (3, 5),
    "conv_L_cache": (3, 5),
    "mamba_d_state": (27, 33),
    "mamba_dt_rank": (19, 21),
    "ssm_state_size": (27, 33),
    "mamba_num_heads": (12, 14),
    "mamba_head_dim": (17, 25),
    "n_groups": (4, 7),
    "max_position_embeddings": (64, 64),
    "router_hidden_size": (62, 74),
    "kv_channels": (24, 28),
    "sliding_window": (16, 16),
    "swa_num_attention_heads": (12, 15),
    "swa_head_dim": (20, 26),
    "swa_num_key_value_heads": (4, 3),
    "rotary_dim": (8, 8),
    "block_size": (16, 16),
}
"""As `NUMBERS`, for the families of `small`; a list stands for itself."""
TOWER = {
    "vocab_size": (331, 337),
    "hidden_size": (72, 84),
    "intermediate_size": (152, 184),
    "num_hidden_layers": (2, 2),
    "depth": (2, 2),
    "num_attention_heads": (3, 6),
    "num_heads": (3, 6),
    "num_key_value_heads": (3, 6),
    "in_channels": (5, 4),
    "num_channels": (5, 4),
    "patch_size": (7, 11),
    "temporal_patch_size": (2, 3),
    "spatial_merge_size": (3, 2),
    "num_position_embeddings": (16, 25),
    "deepstack_visual_indexes": ([0], [0, 1]),
}
"""As `NUMBERS`, for vision and audio."""


def small(model_type: str, more: dict[str, Any] | None = None) -> Any:
    """Return the config function of a family whose config may be nested; a pair in ``more`` is
    chosen from.
    """

    def config(v: int) -> Any:
        cls = transformers.CONFIG_MAPPING[model_type]
        return cls(**_arguments(cls, v, more or {}, False))

    return config


def _arguments(cls: Any, v: int, more: dict[str, Any], tower: bool) -> dict[str, Any]:
    base = cls()
    known = vars(base).keys() | getattr(cls, "attribute_map", {}).keys()
    numbers: dict[str, Any] = TOWER if tower else NUMBERS | MORE_NUMBERS
    known -= {alias for alias, real in getattr(cls, "attribute_map", {}).items() if real in numbers}
    given = {k: n[v] for k, n in numbers.items() if k in known}
    given |= {k: 0 for k in known if k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    given |= {"tie_word_embeddings": False} if "tie_word_embeddings" in known else {}
    for key, sub in (getattr(cls, "sub_configs", None) or {}).items():
        own = vars(base).get(key)
        kind = type(own) if hasattr(own, "to_dict") else sub
        given[key] = _arguments(kind, v, more.get(key, {}), tower or "text" not in key) | {
            "model_type": kind.model_type
        }
    for key, value in more.items():
        if not isinstance(value, dict) or key not in given:
            given[key] = value[v] if isinstance(value, tuple) else value
    return {k: x for k, x in given.items() if x is not None}


def one_of(key: str, *values: str) -> list[dict[str, Any]]:
    """Return the rule for layers of which a list of the config says one of these."""
    return [{"list": key, "is": list(values)}]


def sparse(*rules: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the kinds ``sparse`` and ``dense``: by ``mlp_layer_types``, else by rules for the
    sparse ones.
    """
    either = [{"list": "mlp_layer_types", "is": ["sparse"]}, *rules]
    return {"sparse": either, "dense": [r | {"not": not r.get("not", False)} for r in either]}


def family(
    model_type: str, model: str, more: dict[str, Any] | None = None, **spec: Any
) -> dict[str, dict[str, Any]]:
    """Return the entry of a family that `small` makes."""
    found = {
        "config": small(model_type, more),
        "model": model,
        "flags": [],
        "switches": True,
    } | spec
    return {model_type: found}


DECAYS = r"\.self_attn\.(slope_rate|(diagonal|key|query)_decay)$"
"""What MiniMax computes from its config; transformers saves it."""
AFTER_DENSE = sparse({"from": "first_k_dense_replace"})
MIXED = {
    "linear": one_of("layer_types", "linear_attention"),
    "full": one_of("layer_types", "full_attention"),
}
TYPES = ["linear_attention", "full_attention", "linear_attention"]
GATED_DELTA = [
    "2*{t}linear_key_head_dim*{t}linear_num_key_heads+{t}linear_num_value_heads*{t}linear_value_head_dim",
    "2*{t}linear_key_head_dim*{t}linear_num_key_heads+2*{t}linear_num_value_heads*{t}linear_value_head_dim",
    "2*{t}linear_num_value_heads",
    "2*{t}head_dim*{t}num_attention_heads",
]
MAMBA2 = [
    "mamba_head_dim*mamba_num_heads+2*n_groups*ssm_state_size",
    "2*mamba_head_dim*mamba_num_heads+2*n_groups*ssm_state_size+mamba_num_heads",
]


def within(text: str, hints: list[str]) -> list[str]:
    """Return hints with the place of the text config filled in."""
    return [h.replace("{t}", text) for h in hints]


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
EVERY: dict[str, Any] = {"period": "interleave_moe_layer_step", "shift": 1}
LLAMA4 = {
    "sparse": [{"named": "moe_layers"}, EVERY],
    "dense": [{"named": "moe_layers", "not": True}, EVERY | {"not": True}],
}
GEMMA4: dict[str, Any] = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "hidden_size_per_layer_input": (34, 38),
    "vocab_size_per_layer_input": 331,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
KIMI_NAMES = [
    (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
    (r"^model\.mm_projector\.", "mm_projector."),
    (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
]
"""Kimi-K2.5's names as released, which transformers reads and does not write."""
KIMI_SPELLINGS = {
    "vision_config.hidden_size": ["vision_config.vt_hidden_size"],
    "vision_config.intermediate_size": ["vision_config.vt_intermediate_size"],
    "vision_config.num_hidden_layers": ["vision_config.vt_num_hidden_layers"],
    "vision_config.pos_emb_height": ["vision_config.init_pos_emb_height"],
    "vision_config.pos_emb_width": ["vision_config.init_pos_emb_width"],
}
DEEPSEEK_V4: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe"],
    "hc_mult": (4, 3),
    "o_groups": (2, 5),
    "num_experts_per_tok": (2, 6),
}
DEEPSEEK_V4_NAMES = [
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
]
"""DeepSeek-V4's names as released, which transformers reads and does not write."""
DEEPSEEK_V4_LAYERS: dict[str, list[dict[str, Any]]] = {
    "compressed": [
        {
            "list": "layer_types",
            "is": ["compressed_sparse_attention", "heavily_compressed_attention"],
        },
        {"list": "compress_ratios", "is": [4, 128]},
    ],
    "indexed": [
        {"list": "layer_types", "is": ["compressed_sparse_attention"]},
        {"list": "compress_ratios", "is": [4]},
    ],
    "heavily compressed": [
        {"list": "layer_types", "is": ["heavily_compressed_attention"]},
        {"list": "compress_ratios", "is": [128]},
    ],
    "hashed": [
        {"list": "mlp_layer_types", "is": ["hash_moe"]},
        {"from": "num_hash_layers", "not": True},
    ],
    "routed": [
        {"list": "mlp_layer_types", "is": ["moe"]},
        {"from": "num_hash_layers"},
    ],
}
SMALL_FAMILIES: dict[str, dict[str, Any]] = {
    **family("deepseek_v2", "DeepseekV2ForCausalLM", kinds=AFTER_DENSE, nullable=["q_lora_rank"]),
    **family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        kinds=AFTER_DENSE,
        more_layers="num_nextn_predict_layers",
    ),
    **family(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        kinds=AFTER_DENSE,
        more_layers="num_nextn_predict_layers",
    ),
    **family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {"layer_types": TYPES},
        kinds=MIXED,
        hints=within("", GATED_DELTA),
    ),
    **family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {"layer_types": TYPES},
        kinds=MIXED,
        hints=within("", GATED_DELTA),
        optional=["^mtp\\."],
    ),
    **family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": {"layer_types": TYPES}, "vision_config": {"out_hidden_size": (114, 130)}},
        kinds=MIXED,
        hints=within("text_config.", GATED_DELTA),
        optional=["^mtp\\."],
    ),
    **family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        },
        kinds={
            kind: [
                {"list": "layers_block_type", "is": words},
                {"list": "hybrid_override_pattern", "is": [letter]},
            ]
            for kind, letter, words in (
                ("mamba", "M", ["linear_attention", "mamba"]),
                ("moe", "E", ["moe"]),
                ("attention", "*", ["full_attention", "attention"]),
                ("mlp", "-", ["mlp"]),
            )
        },
        layers="layers_block_type",
        given={"moe_latent_size": (62, 70)},
        hints=MAMBA2,
        optional=["^mtp\\."],
    ),
    **family("afmoe", "AfmoeForCausalLM", kinds=sparse({"from": "num_dense_layers"})),
    **family("axk1", "AXK1ForCausalLM", kinds=AFTER_DENSE),
    **family(
        "axk2",
        "AXK2ForCausalLM",
        kinds=AFTER_DENSE,
        hints=[
            "num_attention_heads*qk_nope_head_dim+num_attention_heads*qk_rope_head_dim+num_attention_heads*v_head_dim"
        ],
    ),
    **family("cohere2_moe", "Cohere2MoeForCausalLM", kinds=AFTER_DENSE),
    **family("exaone_moe", "ExaoneMoeForCausalLM", kinds=AFTER_DENSE, optional=["^mtp\\."]),
    **family("flex_olmo", "FlexOlmoForCausalLM"),
    **family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        kinds=AFTER_DENSE,
        more_layers="num_nextn_predict_layers",
    ),
    **family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    **family("hy_v3", "HYV3ForCausalLM", kinds=AFTER_DENSE, more_layers="num_nextn_predict_layers"),
    **family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "conv", "full_attention", "conv"],
        },
        kinds=sparse({"from": "num_dense_layers"})
        | {"conv": one_of("layer_types", "conv"), "full": one_of("layer_types", "full_attention")},
    ),
    **family("mellum", "MellumForCausalLM", kinds=AFTER_DENSE, optional=["^mtp\\."]),
    **family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        kinds=AFTER_DENSE
        | {
            "sliding": one_of("layer_types", "sliding_attention"),
            "full": one_of("layer_types", "full_attention"),
        },
        vague=r"self_attn",
        optional=["^(model\\.)?mtp\\."],
    ),
    **family(
        "minimax",
        "MiniMaxForCausalLM",
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        kinds=MIXED,
        hints=["3*head_dim*num_attention_heads"],
        drop=DECAYS,
        optional=[DECAYS],
    ),
    **family("solar_open", "SolarOpenForCausalLM", kinds=AFTER_DENSE),
    **family(
        "jamba",
        "JambaForCausalLM",
        {
            "num_hidden_layers": 6,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        kinds={
            "attention": [{"period": "attn_layer_period", "offset": "attn_layer_offset"}],
            "mamba": [{"period": "attn_layer_period", "offset": "attn_layer_offset", "not": True}],
            "sparse": [{"period": "expert_layer_period", "offset": "expert_layer_offset"}],
            "dense": [
                {"period": "expert_layer_period", "offset": "expert_layer_offset", "not": True}
            ],
        },
    ),
    **family("beam", "BeamForCausalLM", kinds=AFTER_DENSE),
    **family("kolibri1", "Kolibri1ForCausalLM"),
    **family(
        "flint",
        "FlintForCausalLM",
        {"mlp_only_layers": [0]},
        kinds={
            "dense": [{"named": "mlp_only_layers"}],
            "sparse": [{"named": "mlp_only_layers", "not": True}],
        },
    ),
    **family("gpt_oss", "GptOssForCausalLM"),
    **family("granitemoe", "GraniteMoeForCausalLM"),
    **family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    **family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    **family(
        "mistral4",
        "Mistral4ForCausalLM",
        {"num_key_value_heads": (6, 10), "rope_parameters": PLAIN_ROPE},
        kinds=AFTER_DENSE,
    ),
    **family(
        "llama4_text",
        "Llama4ForCausalLM",
        {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
        kinds=LLAMA4,
    ),
    **family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {"vision_config": {"out_hidden_size": (114, 130)}},
    ),
    **family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        GEMMA4,
        kinds={
            "sliding": one_of("layer_types", "sliding_attention"),
            "full": one_of("layer_types", "full_attention"),
        },
        vague=r"self_attn|per_layer",
        nullable=["hidden_size_per_layer_input"],
    ),
    **family(
        "dbrx",
        "DbrxForCausalLM",
        {
            "d_model": (114, 130),
            "n_heads": (6, 10),
            "n_layers": 3,
            "attn_config": {"kv_n_heads": (2, 5), "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {
                "ffn_hidden_size": (40, 56),
                "moe_num_experts": (7, 9),
                "moe_top_k": 2,
                "hidden_size": (114, 130),
            },
        },
        layers="n_layers",
        switches=False,
        vague="Wqkv",
    ),
    **family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": TYPES,
            "mamba_n_heads": (12, 20),
            "mamba_d_head": (19, 13),
            "mamba_n_groups": (4, 5),
        },
        kinds=MIXED,
        hints=[
            "mamba_n_heads*mamba_d_head",
            "mamba_n_heads*mamba_d_head+2*mamba_n_groups*mamba_d_state",
            "2*mamba_n_heads*mamba_d_head+2*mamba_n_groups*mamba_d_state+mamba_n_heads",
            "2*shared_intermediate_size",
        ],
    ),
    **family(
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
            "vision_config": {
                "hidden_size": (72, 84),
                "intermediate_size": (304, 336),
                "image_size": 28,
                "patch_size": (7, 14),
                "projector_input_dim": (88, 92),
                "projector_output_dim": (88, 92),
                "vision_output_dim": (88, 92),
            },
        },
        kinds=LLAMA4,
        vague="patch_embedding|positional_embedding",
    ),
    **family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        kinds=AFTER_DENSE,
        vague="vision|vit_|self_attn",
    ),
    **family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    **family(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        {"vision_config": {"pos_emb_height": (61, 67), "pos_emb_width": (71, 73)}},
        kinds=AFTER_DENSE,
        hints=["4*vision_config.hidden_size"],
        vague=r"pre_norm",
        renames=KIMI_NAMES,
        spellings=KIMI_SPELLINGS,
        more_layers="text_config.num_nextn_predict_layers",
    ),
    **family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        DEEPSEEK_V4,
        kinds=DEEPSEEK_V4_LAYERS,
        hints=[
            "hc_mult*hc_mult+2*hc_mult",
            "num_attention_heads*head_dim/o_groups",
            "num_experts_per_tok",
        ],
        renames=DEEPSEEK_V4_NAMES,
        drop="hc_",  # accepted, not required: reduced checkpoints leave the streams out
        optional=["^mtp\\.", "hc_"],
    ),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "config": text_model("llama"),
        "model": "LlamaForCausalLM",
        "flags": ["attention_bias", "mlp_bias"],
    },
    "mixtral": {"config": text_model("mixtral"), "model": "MixtralForCausalLM", "flags": []},
    "qwen3_moe": {
        "config": text_model("qwen3_moe", mlp_only_layers=[1], decoder_sparse_step=1),
        "model": "Qwen3MoeForCausalLM",
        "flags": ["attention_bias"],
    },
    "qwen3": {
        "config": text_model("qwen3"),
        "model": "Qwen3ForCausalLM",
        "flags": ["attention_bias"],
    },
    "qwen2": {"config": text_model("qwen2"), "model": "Qwen2ForCausalLM", "flags": []},
    "qwen2_moe": {
        "config": text_model("qwen2_moe", mlp_only_layers=[1]),
        "model": "Qwen2MoeForCausalLM",
        "flags": [],
    },
    "mistral": {"config": text_model("mistral"), "model": "MistralForCausalLM", "flags": []},
    "minimax_m2": {
        "config": text_model("minimax_m2"),
        "model": "MiniMaxM2ForCausalLM",
        "flags": [],
    },
    "olmoe": {
        "config": text_model("olmoe", own_head_dim=False),
        "model": "OlmoeForCausalLM",
        "flags": ["attention_bias"],
    },
    "phimoe": {
        "config": text_model("phimoe"),
        "model": "PhimoeForCausalLM",
        "flags": ["attention_bias", "lm_head_bias"],
    },
    "deepseek_v3": {
        "config": text_model("deepseek_v3", first_k_dense_replace=1),
        "model": "DeepseekV3ForCausalLM",
        "flags": ["attention_bias"],
        "nullable": ["q_lora_rank"],
        "more_layers": "num_nextn_predict_layers",
    },
    "glm4_moe": {
        "config": text_model("glm4_moe", first_k_dense_replace=1),
        "model": "Glm4MoeForCausalLM",
        "flags": ["attention_bias", "use_qk_norm"],
        "more_layers": "num_nextn_predict_layers",
    },
    "dots1": {
        "config": text_model("dots1", first_k_dense_replace=1),
        "model": "Dots1ForCausalLM",
        "flags": ["attention_bias"],
    },
    "ernie4_5_moe": {
        "config": text_model("ernie4_5_moe", mlp_layer_types=["dense", "sparse", "sparse"]),
        "model": "Ernie4_5_MoeForCausalLM",
        "flags": ["use_bias"],
        "optional": ["^model\\.mtp_"],
    },
    "kimi_k2": {
        "config": text_model("deepseek_v3", first_k_dense_replace=1),
        "model": "DeepseekV3ForCausalLM",
        "flags": ["attention_bias"],
        "nullable": ["q_lora_rank"],
        "more_layers": "num_nextn_predict_layers",
    },
    **SMALL_FAMILIES,
    "minimax_m3_vl": {
        "config": minimax_m3_vl,
        "model": "MiniMaxM3SparseForConditionalGeneration",
        "flags": [],
        "optional": ["^mtp\\."],
    },
}
Shapes = dict[str, tuple[int, ...]]
SPELLINGS = {
    "num_local_experts": ["num_experts", "n_routed_experts"],
    "num_experts": ["num_local_experts"],
    "n_routed_experts": ["num_experts", "num_local_experts"],
    "layers_block_type": ["num_hidden_layers"],
    "text_config.index_n_heads": ["text_config.sparse_attention_config.sparse_num_index_heads"],
    "text_config.index_head_dim": ["text_config.sparse_attention_config.sparse_index_dim"],
    "vision_config.spatial_merge_size": [
        "vision_config.img_token_compression_config.spatial_merge_size"
    ],
    "vision_config.temporal_patch_size": [
        "vision_config.img_token_compression_config.temporal_patch_size"
    ],
}


def released(names: Shapes, spec: dict[str, Any]) -> Shapes:
    """Return shapes by the names of the released checkpoints, where transformers writes others."""
    renamed = {}
    for name, shape in names.items():
        for found, instead in spec.get("renames", ()):
            name = re.sub(found, instead, name)
        renamed[name] = shape
    return renamed


def saved(config: Any, spec: dict[str, Any]) -> tuple[Shapes, Shapes]:
    """Return names and shapes as saved, and as in memory."""
    torch.manual_seed(0)
    built = getattr(transformers, spec["model"])(config)
    memory = {n: tuple(t.shape) for n, t in built.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        names = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                names |= {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}
    return released(names, spec), memory


def pattern(name: str) -> str:
    """Return a name with its numbers replaced by the range that they run over."""
    name = re.sub(r"(\.experts)\.\d+\.", r"\1.{expert}.", name)
    name = re.sub(r"(deepstack_merger_list)\.\d+\.", r"\1.{merger}.", name)
    kind = "vision_layer" if re.search(r"vision|visual", name) else "layer"
    return re.sub(r"(layers|blocks)\.\d+\.", rf"\1.{{{kind}}}.", name)


def layer(name: str) -> int:
    """Return the layer number in a name."""
    found = re.search(r"(?:layers|blocks)\.(\d+)", name)
    if found is None:
        raise SystemExit(f"{name}: no layer in it")
    return int(found[1])


def values(config: Any) -> dict[str, int]:
    """Return the whole numbers of a config by dotted path."""
    found: dict[str, int] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if type(value) is int and value > 1:
                found[prefix + key] = value
            elif isinstance(value, dict):
                walk(f"{prefix}{key}.", value)

    walk("", config.to_dict())
    text = "text_config." if "text_config" in config.to_dict() else ""
    if f"{text}kv_lora_rank" in found:
        found.pop(f"{text}head_dim", None)  # transformers' own, derived
    elif (
        f"{text}head_dim" not in found
        and {f"{text}hidden_size", f"{text}num_attention_heads"} <= found.keys()
    ):
        found[f"{text}head_dim"] = (
            found[f"{text}hidden_size"] // found[f"{text}num_attention_heads"]
        )
    return found


NO_SIZE = re.compile(
    r"(_token_id|_token_index|rotary_dim|max_position|merged_hidden|topk|block|per_tok|image_size|window|"
    r"num_hidden_layers|qk_head_dim|n_group$|window_layers|num_nextn)"
)
"""Config keys that are no size of a tensor unless a hint names them."""


def explain(
    dims: tuple[int, int], tables: list[dict[str, int]], hints: list[str] | None = None
) -> str:
    """Return the shortest product of config paths that gives both observed sizes; of ``hints`` the
    first that does.
    """
    for hint in hints or []:
        if all(_evaluated(hint, t) == d for t, d in zip(tables, dims, strict=True)):
            return hint
    known = [p for p in set(tables[0]) & set(tables[1]) if not NO_SIZE.search(p)]
    paths = sorted(known, key=lambda p: (p.count("."), len(p), p))
    for count in (1, 2, 3):
        for combo in itertools.combinations_with_replacement(paths, count):
            if all(_product(t, combo) == d for t, d in zip(tables, dims, strict=True)):
                return "*".join(combo)
    if dims[0] == dims[1]:
        return str(dims[0])
    for numbers in ((2,), (3,)):
        for path in paths:
            if all(numbers[0] * t[path] == d for t, d in zip(tables, dims, strict=True)):
                return f"{numbers[0]}*{path}"
    pairs = [c for n in (1, 2) for c in itertools.combinations_with_replacement(paths, n)]
    sums = {tuple(_product(t, c) for t in tables): "*".join(c) for c in reversed(pairs)}
    for first, name in reversed(sums.items()):
        second = sums.get(tuple(d - f for d, f in zip(dims, first, strict=True)))
        if second is not None:
            return f"{name}+{second}"
    raise SystemExit(f"no product of config values explains {dims}")


def _evaluated(text: str, table: dict[str, int]) -> int | None:
    total = 0
    for term in text.split("+"):
        product, _, divisor = term.partition("/")
        factors = [int(f) if f.isdigit() else table.get(f) for f in product.split("*")]
        by = table.get(divisor) if divisor else 1
        if by is None or None in factors:
            return None
        total += math.prod(f for f in factors if f is not None) // by
    return total


def _product(table: dict[str, int], paths: tuple[str, ...]) -> int:
    total = 1
    for p in paths:
        total *= table[p]
    return total


def layer_kind(name: str, layers: set[int], config: Any, spec: dict[str, Any]) -> str:
    """Return which layers of the text model hold a tensor."""
    text = config.get_text_config()
    own = _family(config, spec)
    everything = set(range(text.num_hidden_layers))
    if layers == everything:
        return "all"
    fitting = [k for k in spec.get("kinds", {}) if set(own.layers(config.to_dict(), k)) == layers]
    types = list(getattr(text, "layer_types", None) or [])
    named = {t for t in types if {i for i, x in enumerate(types) if x == t} == layers}
    if len(fitting) > 1 or (named and fitting in (["sparse"], ["dense"])):
        kinds = " and ".join([*fitting, *sorted(named)])
        raise SystemExit(f"{name}: {kinds} are the same layers of the small model")
    if fitting:
        return fitting[0]
    mlp = getattr(text, "mlp_layer_types", None)
    if mlp is None:
        dense = set(
            getattr(text, "mlp_only_layers", None)
            or range(getattr(text, "first_k_dense_replace", 0))
        )
    else:
        dense = {i for i, k in enumerate(mlp) if k == "dense"}
    kinds = {"dense": dense, "sparse": everything - dense}
    kinds["indexer"] = {
        i for i, k in enumerate(getattr(text, "layer_types", None) or []) if "sparse" in k
    }
    for kind, members in kinds.items():
        if members and members == layers and kind not in spec.get("kinds", {}):
            return kind
    raise SystemExit(f"{name}: no kind of layer explains {sorted(layers)}")


def _text(config: Any) -> str:
    return "text_config." if hasattr(config, "text_config") else ""


def _hints(spec: dict[str, Any], config: Any) -> list[str]:
    """Return the formulas to try first: those of the family, and twice each inner size (gate and up
    in one).
    """
    if not spec.get("switches"):
        return list(spec.get("hints", []))
    inner = (
        "moe_intermediate_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "shared_intermediate_size",
    )
    return [*spec.get("hints", []), *(f"2*{_text(config)}{k}" for k in inner)]


def _family(config: Any, spec: dict[str, Any]) -> Family:
    """Return the family of the rules alone, to ask which layers they mean."""
    ranges = {"layer": _text(config) + spec.get("layers", "num_hidden_layers")}
    data = {
        "text": _text(config),
        "ranges": ranges,
        "spellings": {},
        "defaults": {},
        "kinds": spec.get("kinds", {}),
    }
    return Family("", data)


def make(model_type: str) -> dict[str, Any]:
    """Return the family data of one model type."""
    spec = FAMILIES[model_type]
    configs = [spec["config"](0), spec["config"](1)]
    observed = [saved(c, spec) for c in configs]
    tables = [values(c) for c in configs]
    tensors, seen, hints = [], {}, _hints(spec, configs[0])
    for name in observed[0][0]:
        seen.setdefault(pattern(name), []).append(name)
    for pat, names in seen.items():
        sizes: dict[Any, list[str]] = {}
        for name in names:
            sizes.setdefault((observed[0][0][name], observed[1][0].get(name, ())), []).append(name)
        for (
            first,
            second,
        ), members in sizes.items():  # of two sizes, each belongs to a kind of layer
            if len(first) != len(second):
                continue  # of an expert or a layer that only one of the two models has
            vague = "vague" in spec and re.search(
                spec["vague"], pat
            )  # of a size that only lists in the config tell
            sides = zip(first, second, strict=True)
            entry: dict[str, Any] = {
                "name": pat,
                "shape": None if vague else [explain(s, tables, hints) for s in sides],
            }
            if "{layer}" in pat:
                entry["layers"] = layer_kind(pat, {layer(n) for n in members}, configs[0], spec)
            tensors.append(entry)
    for flag in spec["flags"]:
        tensors += _flagged(spec, flag, seen, tables)
    for key in spec.get("nullable", []):
        tensors = _nullable(spec, key, tensors, tables)
    switches: dict[str, bool] = {}
    if spec.get("switches"):
        tensors, switches = _switched(spec, tensors, tables)
    memory = sorted({pattern(n) for n in observed[0][1]} - set(seen))
    used = {
        p
        for t in tensors
        for d in t["shape"] or ()
        for p in re.split(r"[*+/]", d)
        if not p.isdigit()
    }
    text = _text(configs[0])
    experts = next((p for p in EXPERTS if text + p in tables[0]), None)
    ranges = {"layer": text + spec.get("layers", "num_hidden_layers")}
    if experts:
        ranges["expert"] = text + experts
    if any("{vision_layer}" in p for p in seen):
        depth = "depth" if "depth" in vars(configs[0].vision_config) else "num_hidden_layers"
        ranges["vision_layer"] = f"vision_config.{depth}"
    if any("{merger}" in p for p in seen):
        ranges["merger"] = "vision_config.deepstack_visual_indexes"
    deciding = {
        text + k for k in ("first_k_dense_replace", "moe_layer_start_index", "decoder_sparse_step")
    }
    deciding |= set(spec.get("nullable", []))
    deciding |= {
        text + r[k]
        for rules in spec.get("kinds", {}).values()
        for r in rules
        for k in RULE_KEYS
        if k in r
    }
    defaults = _defaults(type(configs[0]), used | set(ranges.values()) | deciding) | switches
    if bool(type(configs[0])().to_dict().get("tie_word_embeddings")):
        defaults["tie_word_embeddings"] = True
    spellings = SPELLINGS | spec.get("spellings", {})
    made_with = f"transformers {transformers.__version__}, {spec['model']}"
    found = {
        "model_type": model_type,
        "made_by": f"tools/make_families.py, {made_with}",
        "text": text,
        "ranges": ranges,
        "defaults": defaults,
        "spellings": {
            p: spellings[p] for p in sorted(used | set(ranges.values())) if p in spellings
        },
        "optional": spec.get("optional", []),
        "more_layers": spec.get("more_layers", ""),
        "tensors": sorted(tensors, key=lambda t: (t["name"], str(t.get("unless", "")))),
        "in_memory": memory,
    }
    if spec.get("kinds"):
        found["kinds"] = spec["kinds"]
    if spec.get("drop"):
        found["tensors"] = [t for t in found["tensors"] if not re.search(spec["drop"], t["name"])]
    return found


RULE_KEYS = ("from", "period", "offset")


def _switched(
    spec: dict[str, Any], tensors: list[dict[str, Any]], tables: list[dict[str, int]]
) -> tuple[list[dict[str, Any]], dict[str, bool]]:
    """Return the tensors with those marked that a yes or no of the config gives, takes away or
    resizes; and its default.
    """
    configs = [spec["config"](0), spec["config"](1)]
    plain = [_on_meta(c, spec) for c in configs]
    switches: dict[str, bool] = {}
    for place in dict.fromkeys((_text(configs[0]), "")):
        own = vars(configs[0].text_config if place else configs[0])
        for key in sorted(
            k for k, v in own.items() if type(v) is bool and not k.startswith("_") and k not in IDLE
        ):
            turned = _turned(spec, place, key, 0)
            if turned is None or turned == plain[0]:
                continue
            other = _turned(spec, place, key, 1)
            if other is None:
                raise SystemExit(f"{key}: turned round, one of two configs gives no model")
            on = bool(own[key])
            tensors = _marked(spec, tensors, place + key, on, [turned, other], plain, tables)
            switches[place + key] = _switch_default(type(configs[0]), place + key)
    for key, numbers in spec.get("given", {}).items():
        set_so = [_turned(spec, "", key, v, numbers[v]) for v in (0, 1)]
        wider = [t | {key: n} for t, n in zip(tables, numbers, strict=True)]
        tensors = _marked(spec, tensors, key, False, [s or {} for s in set_so], plain, wider)
    return tensors, switches


IDLE = {
    "tie_word_embeddings",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "is_encoder_decoder",
}


def _switch_default(cls: Any, path: str) -> bool:
    node: Any = cls().to_dict()
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return bool(node)


def _turned(
    spec: dict[str, Any], place: str, key: str, v: int, value: int | None = None
) -> Shapes | None:
    """Return what a config with one yes or no turned round, or one value set, gives; None where it
    gives no model.
    """
    config = spec["config"](v)
    own = config.text_config if place else config
    try:
        setattr(own, key, not getattr(own, key) if value is None else value)
        return _on_meta(config, spec)
    except Exception:  # noqa: BLE001  (a combination that the class does not have)
        return None


def _on_meta(config: Any, spec: dict[str, Any]) -> Shapes:
    """Return names and shapes as `save_pretrained` would write them, without values."""
    with torch.device("meta"):
        built = getattr(transformers, spec["model"])(config)
    state = dict(built.state_dict())
    tied = getattr(built, "all_tied_weights_keys", None) or {}
    ignored = getattr(built, "_keys_to_ignore_on_save", None) or ()
    kept = {
        k: v
        for k, v in state.items()
        if k not in tied and not any(re.search(p, k) for p in ignored)
    }
    shapes = {n: tuple(t.shape) for n, t in revert_weight_conversion(built, kept).items()}
    return released(shapes, spec)


def _marked(
    spec: dict[str, Any],
    tensors: list[dict[str, Any]],
    key: str,
    on: bool,
    turned: list[Shapes],
    plain: list[Shapes],
    tables: list[dict[str, int]],
) -> list[dict[str, Any]]:
    here, there = ("if", "unless") if on else ("unless", "if")
    patterns = [{pattern(n): s for n, s in found.items()} for found in (*plain, *turned)]
    marked: list[dict[str, Any]] = []
    for entry in tensors:
        name = entry["name"]
        before, after = [p.get(name) for p in patterns[:2]], [p.get(name) for p in patterns[2:]]
        if before in (after, [None, None]):
            marked.append(entry)
        else:
            marked.append(entry | {here: [*entry.get(here, []), key]})
    names: dict[str, set[int]] = {}
    for name in turned[0]:
        names.setdefault(pattern(name), set()).update(
            {layer(name)} if "{layer}" in pattern(name) else ()
        )
    for name, at in names.items():
        if (
            patterns[0].get(name) == patterns[2][name]
            and patterns[1].get(name) == patterns[3][name]
        ):
            continue
        sides = zip(patterns[2][name], patterns[3][name], strict=True)
        vague = "vague" in spec and re.search(spec["vague"], name)
        shape = (
            None if vague else [explain(s, tables, _hints(spec, spec["config"](0))) for s in sides]
        )
        entry = {"name": name, "shape": shape, there: [key]}
        if at:
            entry["layers"] = layer_kind(name, at, spec["config"](0), spec)
        marked.append(entry)
    return marked


def _flagged(
    spec: dict[str, Any], flag: str, seen: dict[str, Any], tables: list[dict[str, int]]
) -> list[dict[str, Any]]:
    config = [spec["config"](0), spec["config"](1)]
    for c in config:
        setattr(c, flag, True)
    found = [saved(c, spec)[0] for c in config]
    one = {pattern(n): s for n, s in found[1].items()}
    more: dict[str, Any] = {}
    for name, shape in found[0].items():
        pat = pattern(name)
        if pat in seen:
            continue
        dims = [explain((a, b), tables) for a, b in zip(shape, one[pat], strict=True)]
        entry = more.setdefault(pat, {"name": pat, "shape": dims, "if": flag, "at": set()})
        entry["at"] |= {int(i) for i in re.findall(r"layers\.(\d+)", name)}
    for entry in more.values():
        at = entry.pop("at")
        if at:
            entry["layers"] = layer_kind(entry["name"], at, config[0], spec)
    return list(more.values())


def _nullable(
    spec: dict[str, Any], key: str, tensors: list[dict[str, Any]], tables: list[dict[str, int]]
) -> list[dict[str, Any]]:
    """Return the tensors with those that only belong where a config value is set, or is null,
    marked so.
    """
    config = [spec["config"](0), spec["config"](1)]
    for c in config:
        _unset(c, key)
    found = [{pattern(n): s for n, s in saved(c, spec)[0].items()} for c in config]
    known = {t["name"] for t in tensors}
    marked = [t if t["name"] in found[0] or t.get("if") else t | {"if": key} for t in tensors]
    for name, shape in found[0].items():
        if name not in known:
            dims = [explain((a, b), tables) for a, b in zip(shape, found[1][name], strict=True)]
            marked.append({"name": name, "shape": dims, "unless": key, "layers": "all"})
    return marked


def _unset(config: Any, key: str) -> None:
    """Set a config value to null, or to 0 where its class takes whole numbers alone."""
    try:
        setattr(config, key, None)
    except StrictDataclassFieldValidationError:
        setattr(config, key, 0)


def _defaults(cls: type, paths: set[str]) -> dict[str, int]:
    table = cls().to_dict()
    found: dict[str, int] = {}
    for path in sorted(paths):
        node: Any = table
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if type(node) is int:
            found[path] = node
    for path in [p for p in found if p.endswith("head_dim") and "index" not in p]:
        text = path.removesuffix("head_dim")
        hidden, heads = found.get(f"{text}hidden_size"), found.get(f"{text}num_attention_heads")
        if hidden and heads and hidden // heads == found[path] and not text:
            other = cls(hidden_size=2 * hidden).to_dict().get("head_dim")
            if other != found[path]:
                del found[path]  # transformers derives it
    return found


def main() -> int:
    """Write or compare every family, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE")
    args = parser.parse_args()
    stale = []
    for model_type in args.families or FAMILIES:
        text = json.dumps(make(model_type), indent=1) + "\n"
        file = OUT / f"{model_type}.json"
        if args.check:
            old = json.loads(file.read_text())
            new = json.loads(text)
            old.pop("made_by"), new.pop("made_by")
            if old != new:
                stale.append(file.name)
        else:
            file.write_text(text)
            print(file.name, len(text), "bytes")
    if stale:
        print("differ from what transformers saves:", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
