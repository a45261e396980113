# SPDX-License-Identifier: Apache-2.0
"""Layouts against what transformers saves, with dimensions that the generator never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from verifier.families import family_of, known  # noqa: E402

NUMBERS = {
    "vocab_size": 347, "hidden_size": 96, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_local_experts": 5, "num_experts": 5, "n_routed_experts": 10, "moe_num_experts": 5, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 72, "n_shared_experts": 1, "moe_num_shared_experts": 4, "q_lora_rank": 18,
    "kv_lora_rank": 14, "qk_nope_head_dim": 20, "qk_rope_head_dim": 6, "v_head_dim": 22, "num_experts_per_tok": 2,
    "moe_k": 2, "n_group": 2, "topk_group": 1, "num_hidden_layers": 4, "tie_word_embeddings": False,
}  # fmt: skip
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "deepseek_v3": [{"first_k_dense_replace": 2}, {"q_lora_rank": None}, {"attention_bias": True}],
    "glm4_moe": [{"first_k_dense_replace": 1, "use_qk_norm": True, "head_dim": 10}, {"attention_bias": True}],
    "dots1": [{"first_k_dense_replace": 3}],
    "qwen2_moe": [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}],
    "qwen3_moe": [{"mlp_only_layers": [2]}],
    "qwen3": [{"head_dim": 20}, {"tie_word_embeddings": True}],
    "mistral": [{"head_dim": 10}, {}],
    "phimoe": [{"attention_bias": True, "lm_head_bias": True}],
    "ernie4_5_moe": [{"use_bias": True}],
}
CASES = [(m, v) for m in known() if m != "minimax_m3_vl" for v in VARIANTS.get(m, [{}])]


@pytest.mark.parametrize(("model_type", "more"), CASES)
def test_the_layout_is_what_transformers_saves(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    base = transformers.AutoConfig.for_model(model_type)
    given = {k: v for k, v in NUMBERS.items() if hasattr(base, k)} | more
    given |= {k: 0 for k in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(base, k)}
    config = transformers.AutoConfig.for_model(model_type, **given)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as handle:
        saved = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}
    written = json.loads((tmp_path / "config.json").read_text())
    # Hub configs leave out what is derived: only what was given is there, and what decides layers.
    keep = given.keys() | {"model_type", "mlp_layer_types", "moe_layer_freq"}
    family = family_of(written)
    assert family is not None
    assert family.expected(written) == saved
    assert family.expected({k: v for k, v in written.items() if k in keep}) == saved


def test_layers_after_the_last_are_next_token_prediction() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    family = family_of(config)
    assert family is not None
    assert family.beyond(config, "model.layers.61.eh_proj.weight")
    assert not family.beyond(config, "model.layers.60.mlp.gate.weight")
    assert not family.beyond(config, "model.layers.62.eh_proj.weight")
    assert not family.beyond({"model_type": "deepseek_v3", "num_hidden_layers": 61}, "model.layers.61.eh_proj.weight")
