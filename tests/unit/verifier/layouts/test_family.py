# SPDX-License-Identifier: Apache-2.0
"""Layouts against what transformers saves, with dimensions that the generator never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

from tests.zoo.families import BY_NAME, config  # noqa: E402
from tests.zoo.run import quiet  # noqa: E402
from verifier.layouts.family import Family, family_of, known  # noqa: E402

NUMBERS = {
    "vocab_size": 347,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 5,
    "num_experts": 5,
    "n_routed_experts": 10,
    "moe_num_experts": 5,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 72,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 4,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 6,
    "v_head_dim": 22,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "deepseek_v3": [{"first_k_dense_replace": 2}, {"q_lora_rank": None}, {"attention_bias": True}],
    "glm4_moe": [
        {"first_k_dense_replace": 1, "use_qk_norm": True, "head_dim": 10},
        {"attention_bias": True},
    ],
    "dots1": [{"first_k_dense_replace": 3}],
    "qwen2_moe": [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}],
    "qwen3_moe": [{"mlp_only_layers": [2]}],
    "qwen3": [{"head_dim": 20}, {"tie_word_embeddings": True}],
    "mistral": [{"head_dim": 10}, {}],
    "phimoe": [{"attention_bias": True, "lm_head_bias": True}],
    "ernie4_5_moe": [{"use_bias": True}],
}
PLAIN = (
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "llama",
    "minimax_m2",
    "mistral",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
CASES = [(m, v) for m in PLAIN for v in VARIANTS.get(m, [{}])]


@pytest.mark.parametrize(("model_type", "more"), CASES)
def test_the_layout_is_what_transformers_saves(
    model_type: str, more: dict[str, Any], tmp_path: Path
) -> None:
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


# DeepSeek-V4's hub names are the vendor's, not those that transformers saves.
@pytest.mark.parametrize("model_type", [m for m in known() if m in BY_NAME and m != "deepseek_v4"])
def test_the_layout_is_that_of_the_zoo(model_type: str) -> None:
    """Names and shapes as `save_pretrained` would write them, of a model on the meta device."""
    family, spec = family_of({"model_type": model_type}), BY_NAME[model_type]
    if spec.config_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    with quiet(), torch.device("meta"):
        built = getattr(transformers, spec.architecture)(config(spec))
        state = {
            k: v
            for k, v in built.state_dict().items()
            if k not in (built.all_tied_weights_keys or {})
        }
        saved = {n: tuple(t.shape) for n, t in revert_weight_conversion(built, state).items()}
    written = json.loads(built.config.to_json_string())
    assert family is not None
    expected = family.expected(written)
    assert {n for n in saved.keys() - expected.keys() if not family.optional(n)} == set()
    assert expected.keys() - saved.keys() == set()
    assert {n: s for n, s in expected.items() if s is not None and s != saved[n]} == {}


def test_what_a_config_does_not_tell_is_possible_and_not_expected() -> None:
    family = family_of({"model_type": "qwen3_next"})
    assert family is not None
    config = {"model_type": "qwen3_next", "num_hidden_layers": 2, "num_experts": 1}
    reported = config | {"layer_types": ["linear_attention", "full_attention"]}
    linear, full = "model.layers.0.linear_attn.A_log", "model.layers.1.self_attn.q_proj.weight"
    assert family.possible(reported) == {}
    assert {linear, full} <= family.expected(reported).keys()
    both = {
        f"model.layers.{i}.{n}"
        for i in (0, 1)
        for n in ("linear_attn.A_log", "self_attn.q_proj.weight")
    }
    assert both <= family.possible(config).keys()
    assert not both & family.expected(config).keys()


@pytest.mark.parametrize(
    ("rule", "config", "layers"),
    [
        ({"list": "kinds", "is": ["a", "b"]}, {"kinds": ["a", "c", "b", "c"]}, [0, 2]),
        ({"list": "kinds", "is": ["M"]}, {"kinds": "MEM*"}, [0, 2]),
        ({"list": "kinds", "is": ["M"], "not": True}, {"kinds": "MEM*"}, [1, 3]),
        ({"list": "kinds", "is": ["M"]}, {"kinds": "MEM"}, None),
        ({"list": "kinds", "is": ["M"]}, {"kinds": 7}, None),
        ({"named": "numbers"}, {"numbers": [3, 1, "x", [2]]}, [1, 3]),
        ({"named": "numbers"}, {}, None),
        ({"from": "first"}, {"first": 3}, [3]),
        ({"from": "first"}, {"first": None}, None),
        ({"from": "first"}, {"first": -1}, None),
        ({"period": "every", "offset": "at"}, {"every": 3, "at": 1}, [1]),
        ({"period": "every", "shift": 1}, {"every": 2}, [1, 3]),
        ({"period": "every"}, {"every": 0}, None),
    ],
)
def test_rules_for_layers(
    rule: dict[str, Any], config: dict[str, Any], layers: list[int] | None
) -> None:
    data = {
        "text": "",
        "ranges": {"layer": "count"},
        "spellings": {},
        "defaults": {},
        "kinds": {"mine": [rule]},
        "tensors": [{"name": "layers.{layer}.x", "shape": None, "layers": "mine"}],
        "in_memory": [],
        "optional": [],
    }
    family = Family("mine", data)
    given = config | {"count": 4}
    assert family.layers(given, "mine") == (layers or [])
    assert family.expected(given) == {f"layers.{i}.x": None for i in layers or []}
    assert len(family.possible(given)) == (4 if layers is None else 0)


def test_layers_after_the_last_are_next_token_prediction() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    family = family_of(config)
    assert family is not None
    assert family.beyond(config, "model.layers.61.eh_proj.weight")
    assert not family.beyond(config, "model.layers.60.mlp.gate.weight")
    assert not family.beyond(config, "model.layers.62.eh_proj.weight")
    assert not family.beyond(
        {"model_type": "deepseek_v3", "num_hidden_layers": 61}, "model.layers.61.eh_proj.weight"
    )
