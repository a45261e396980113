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


FAMILY = Family(
    config=model_config,
    model=MiniMaxM3SparseForConditionalGeneration,
    text=lambda m: m.model.language_model,
    balance="bias",
    specials=(*SPECIALS, "<|image|>", "<|video|>"),
    frozen=("vision", "projector", "indexer"),
    float32=re.compile(
        r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)$|patch_embedding\.weight$"
    ),
)

if __name__ == "__main__":
    main(FAMILY, __doc__.splitlines()[0])
