# SPDX-License-Identifier: Apache-2.0
"""Train the tiny Qwen3-MoE of this folder and write it as a hub checkpoint.

    python goldens/qwen3-moe-tiny/train.py --text wiki.valid.tokens --out
    goldens/qwen3-moe-tiny/bf16

As the released Qwen3-30B-A3B: every layer sparse, many narrow experts, their softmax weights
normalized over the chosen ones, no shared expert, query and key norms, everything in BF16, one hub
tensor for each projection of each expert.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import VOCAB, Family, main


def model_config() -> Qwen3MoeConfig:
    """Return the tiny configuration; every in-dimension is a multiple of 32."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )


def as_released(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json with the release's name for the number of experts."""
    spelling = {"num_local_experts": "num_experts"}
    return dict(sorted((spelling.get(k, k), v) for k, v in config.items()))


FAMILY = Family(
    config=model_config,
    model=Qwen3MoeForCausalLM,
    text=lambda m: m.model,
    balance="loss",
    as_released=as_released,
)

if __name__ == "__main__":
    main(FAMILY, __doc__.splitlines()[0], steps=1500, batch=4, balance_rate=0.02)
