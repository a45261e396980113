# SPDX-License-Identifier: Apache-2.0
"""Train the tiny gpt-oss of this folder and write it as a hub checkpoint.

    python goldens/gpt-oss-tiny/train.py --text wiki.valid.tokens --out goldens/gpt-oss-tiny/bf16

The hub layout of gpt-oss in BF16: experts stacked in one tensor for all of a layer and transposed,
``gate_up_proj`` [experts, hidden, 2 x intermediate] with gate and up interleaved, ``down_proj``
[experts, intermediate, hidden], a bias for each. As released: layers of sliding and full attention
in turn, attention sinks and biases, YaRN, a clamped SwiGLU, a router with a bias. The release
itself stores the stacks in MXFP4; this is the layout that transformers saves and trains.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import GptOssConfig, GptOssForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import VOCAB, Family, main


def model_config() -> GptOssConfig:
    """Return the tiny configuration; every in-dimension is a multiple of 32."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
    }
    return GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=64,
        rope_parameters=yarn,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GptOssForCausalLM"],
        dtype="bfloat16",
    )


FAMILY = Family(
    config=model_config,
    model=GptOssForCausalLM,
    text=lambda m: m.model,
    balance="loss",
    attention="eager",
)

if __name__ == "__main__":
    main(FAMILY, __doc__.splitlines()[0], steps=900, batch=4, balance_rate=0.02)
