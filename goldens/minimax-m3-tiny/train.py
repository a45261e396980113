# SPDX-License-Identifier: Apache-2.0
"""Train the tiny MiniMax-M3 of this folder and write it as a hub checkpoint.

    python goldens/minimax-m3-tiny/train.py --text wiki.valid.tokens --out
    goldens/minimax-m3-tiny/bf16

The model has every structural feature of the released MiniMax-M3: a dense first layer, sparse
layers with a shared expert and a lightning indexer, a vision tower and projector, float32 router,
correction bias and patch embedding. transformers' ``save_pretrained`` would recast those three, so
the shards are written by `common.write`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import SPECIALS, VOCAB, Family, main


def model_config() -> MiniMaxM3VLConfig:
    """Return the tiny configuration; every in-dimension is a multiple of 32."""
    layers = 4
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 128,
        "dense_intermediate_size": 256,
        "shared_intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.0,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * (layers - 1),
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_block_size": 32,
        "index_topk_blocks": 8,
        "index_local_blocks": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=3,
        video_token_index=4,
        projector_hidden_size=128,
        architectures=["MiniMaxM3SparseForConditionalGeneration"],
        dtype="bfloat16",
    )


def as_released(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json with the release's fields, which engines read.

    transformers reads both spellings and saves its own, which vLLM and SGLang do not read: they
    need ``sparse_attention_config``, ``moe_layer_freq`` and ``img_token_compression_config``.
    """
    text, vision = config["text_config"], config["vision_config"]
    same = (
        "bos_token_id",
        "dense_intermediate_size",
        "eos_token_id",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_local_experts",
        "rms_norm_eps",
        "rotary_dim",
        "routed_scaling_factor",
        "shared_intermediate_size",
        "swiglu_alpha",
        "swiglu_limit",
        "tie_word_embeddings",
        "vocab_size",
    )
    sparse = [int(kind == "minimax_m3_sparse") for kind in text["layer_types"]]
    compression = {
        "image_token_compression_method": "patch_merge",
        "spatial_merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    released_text = {
        **{key: text[key] for key in same},
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "dtype": config["dtype"],
        "hidden_act": "swigluoai",
        "moe_layer_freq": [int(kind == "sparse") for kind in text["mlp_layer_types"]],
        "n_shared_experts": 1,
        "num_mtp_modules": 0,
        "partial_rotary_factor": text["rope_parameters"]["partial_rotary_factor"],
        "qk_norm_type": "per_head",
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "scoring_func": "sigmoid",
        "sparse_attention_config": {
            "sparse_attention_freq": sparse,
            "sparse_block_size": text["index_block_size"],
            "sparse_disable_index_value": sparse,
            "sparse_index_dim": text["index_head_dim"],
            "sparse_init_block": 0,
            "sparse_local_block": text["index_local_blocks"],
            "sparse_num_index_heads": text["index_n_heads"],
            "sparse_score_type": "max",
            "sparse_topk_blocks": text["index_topk_blocks"],
            "use_sparse_attention": True,
        },
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    }
    kept = (
        "attention_dropout",
        "hidden_act",
        "hidden_size",
        "image_size",
        "initializer_range",
        "intermediate_size",
        "layer_norm_eps",
        "num_attention_heads",
        "num_channels",
        "num_hidden_layers",
        "patch_size",
    )
    released_vision = {
        **{key: vision[key] for key in kept},
        "img_token_compression_config": compression,
        "model_type": "clip_vision_model",
        "position_embedding_type": "rope",
        "projection_dim": text["hidden_size"],
        "rope_mode": "3d",
        "rope_theta": vision["rope_parameters"]["rope_theta"],
    }
    return {
        "architectures": config["architectures"],
        "image_token_index": config["image_token_index"],
        "img_token_compression_config": compression,
        "model_type": config["model_type"],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": config["projector_hidden_size"],
        "text_config": dict(sorted(released_text.items())),
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["dtype"],
        "video_token_index": config["video_token_index"],
        "vision_config": dict(sorted(released_vision.items())),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


FAMILY = Family(
    config=model_config,
    model=MiniMaxM3SparseForConditionalGeneration,
    text=lambda m: m.model.language_model,
    balance="bias",
    specials=(*SPECIALS, "<|image|>", "<|video|>"),
    frozen=("vision", "projector", "indexer"),
    as_released=as_released,
    float32=re.compile(
        r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)$|patch_embedding\.weight$"
    ),
)

if __name__ == "__main__":
    main(FAMILY, __doc__.splitlines()[0])
