# SPDX-License-Identifier: Apache-2.0
"""The tiny models: their config, their BF16 tensors, and which of them are linear layers.

Names are those of the hub. A linear layer is [out, in]; gpt-oss stacks its experts [experts, out,
in], as its MXFP4 release does (the BF16 twin is [experts, in, out], as transformers saves it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.formats.files import Array, Tensors
from tests.formats.numbers import bf16, f32

Shapes = dict[str, tuple[int, ...]]
SEED = 20261129
EXPERTS = 4
PARTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
A_PARTS = ("q_a_proj", "kv_a_proj_with_mqa")
"""Linear layers that engines join to one, by the last part of their names."""


@dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        name: its model_type.
        config: config.json without a quantization config.
        shapes: the shapes of its tensors by name; a linear layer's name ends in ``.weight``.
        linears: pattern of the linear layers that a uniform export quantizes, without ``.weight``.
        plain: linear layers that stay as they are, in the order of an exclusion list.
        router: one of ``plain``: what a lost exclusion makes of it is broken.
        spare: a linear layer that is quantized by every recipe.
        target: the linear layer that corruptions edit.
        twin: one of the same shape, of another expert or layer.
        expert: the routed expert of ``target``; '' where experts are stacked or there are none.
        norm: the norm that corruptions edit.
        attention: the attention modules that hold KV scales.
        float32: pattern of tensors that are stored in float32.
    """

    name: str
    config: dict[str, Any]
    shapes: Shapes
    linears: str
    plain: tuple[str, ...]
    router: str
    spare: str
    target: str
    twin: str
    expert: str
    norm: str
    attention: tuple[str, ...] = ()
    float32: str = "$."

    def quantized(self) -> list[str]:
        """Return the linear layers that a uniform export quantizes."""
        names = (n.removesuffix(".weight") for n in self.shapes if n.endswith(".weight"))
        return [n for n in names if re.fullmatch(self.linears, n)]


def fused(name: str) -> str:
    """Return the name of the layer that engines join a linear layer to; its own where to none."""
    head, _, last = name.rpartition(".")
    for parts in (*PARTS, A_PARTS):
        if last in parts:
            return f"{head}.{parts[0]}"
    return name


def weights(model: Model) -> Tensors:
    """Return the BF16 tensors of a model, the same on every call."""
    found = {}
    for number, (name, shape) in enumerate(model.shapes.items()):
        rng = np.random.default_rng((SEED, number))
        values = rng.normal(0, 0.05, shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + values
        found[name] = f32(values) if re.search(model.float32, name) else bf16(values)
    return found


def generator(text: str) -> np.random.Generator:
    """Return the random generator that belongs to a text."""
    return np.random.default_rng([SEED, *text.encode()])


def activation_amax(name: str) -> float:
    """Return the largest input of a linear layer, the same for layers with the same input."""
    return float(generator(f"input {fused(name)}").uniform(2, 6))


def input_scales(name: str, width: int) -> Array:
    """Return a smoothing factor per input channel, the same for layers with the same input."""
    values = np.exp2(generator(f"smooth {fused(name)}").normal(0, 0.5, width))
    return bf16(values)


def _experts(
    layer: str, names: tuple[str, str, str], hidden: int, width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = names
    for expert in range(EXPERTS):
        yield f"{layer}.{expert}.{gate}.weight", (width, hidden)
        yield f"{layer}.{expert}.{up}.weight", (width, hidden)
        yield f"{layer}.{expert}.{down}.weight", (hidden, width)


def _mlp(layer: str, hidden: int, width: int) -> Shapes:
    return {
        f"{layer}.gate_proj.weight": (width, hidden),
        f"{layer}.up_proj.weight": (width, hidden),
        f"{layer}.down_proj.weight": (hidden, width),
    }


def _attention(layer: str, hidden: int, heads: int, kv_heads: int, head: int) -> Shapes:
    return {
        f"{layer}.q_proj.weight": (heads * head, hidden),
        f"{layer}.k_proj.weight": (kv_heads * head, hidden),
        f"{layer}.v_proj.weight": (kv_heads * head, hidden),
        f"{layer}.o_proj.weight": (hidden, heads * head),
    }


_COMMON = {
    "dtype": "bfloat16",
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
}


def _qwen3_moe() -> Model:
    hidden, heads, kv_heads, head, width = 256, 4, 2, 64, 128
    layer = "model.layers.0"
    shapes: Shapes = {
        "model.embed_tokens.weight": (64, hidden),
        f"{layer}.input_layernorm.weight": (hidden,),
        **_attention(f"{layer}.self_attn", hidden, heads, kv_heads, head),
        f"{layer}.self_attn.q_norm.weight": (head,),
        f"{layer}.self_attn.k_norm.weight": (head,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.mlp.gate.weight": (EXPERTS, hidden),
        **dict(
            _experts(f"{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj"), hidden, width)
        ),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (64, hidden),
    }
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_COMMON,
        "hidden_size": hidden,
        "head_dim": head,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 1,
        "intermediate_size": 512,
        "moe_intermediate_size": width,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Model(
        name="qwen3_moe",
        config=config,
        shapes=shapes,
        linears=r".*_proj",
        plain=("lm_head", f"{layer}.mlp.gate"),
        router=f"{layer}.mlp.gate",
        spare=f"{layer}.self_attn.o_proj",
        target=f"{layer}.mlp.experts.2.down_proj",
        twin=f"{layer}.mlp.experts.1.down_proj",
        expert=f"{layer}.mlp.experts.2",
        norm=f"{layer}.input_layernorm.weight",
        attention=(f"{layer}.self_attn",),
    )


def _llama() -> Model:
    hidden, heads, kv_heads, head, width = 256, 4, 2, 64, 512
    shapes: Shapes = {"model.embed_tokens.weight": (64, hidden)}
    for number in range(2):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            **_attention(f"{layer}.self_attn", hidden, heads, kv_heads, head),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            **_mlp(f"{layer}.mlp", hidden, width),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (64, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_COMMON,
        "mlp_bias": False,
        "hidden_size": hidden,
        "head_dim": head,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "intermediate_size": width,
    }
    return Model(
        name="llama",
        config=config,
        shapes=shapes,
        linears=r".*_proj",
        plain=("lm_head",),
        router="lm_head",
        spare="model.layers.0.self_attn.o_proj",
        target="model.layers.1.mlp.down_proj",
        twin="model.layers.0.mlp.down_proj",
        expert="",
        norm="model.layers.0.input_layernorm.weight",
        attention=("model.layers.0.self_attn", "model.layers.1.self_attn"),
    )


def _gpt_oss() -> Model:
    hidden, heads, kv_heads, head, width = 128, 4, 2, 32, 128
    shapes: Shapes = {"model.embed_tokens.weight": (64, hidden)}
    for number in range(2):
        layer = f"model.layers.{number}"
        attention = _attention(f"{layer}.self_attn", hidden, heads, kv_heads, head)
        biases = {n.replace("weight", "bias"): shape[:1] for n, shape in attention.items()}
        shapes |= {
            **attention,
            **biases,
            f"{layer}.self_attn.sinks": (heads,),
            f"{layer}.mlp.router.weight": (EXPERTS, hidden),
            f"{layer}.mlp.router.bias": (EXPERTS,),
            f"{layer}.mlp.experts.gate_up_proj": (EXPERTS, hidden, 2 * width),
            f"{layer}.mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * width),
            f"{layer}.mlp.experts.down_proj": (EXPERTS, width, hidden),
            f"{layer}.mlp.experts.down_proj_bias": (EXPERTS, hidden),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (64, hidden)}
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **_COMMON,
        "attention_bias": True,
        "hidden_size": hidden,
        "head_dim": head,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "intermediate_size": width,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 150000.0, "rope_type": "default"},
    }
    return Model(
        name="gpt_oss",
        config=config,
        shapes=shapes,
        linears=r".*experts\.(gate_up|down)_proj",
        plain=(
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ),
        router="model.layers.1.mlp.router",
        spare="model.layers.0.mlp.experts.down_proj",
        target="model.layers.1.mlp.experts.down_proj",
        twin="model.layers.0.mlp.experts.down_proj",
        expert="",
        norm="model.layers.0.input_layernorm.weight",
    )


def _latent_attention(layer: str, hidden: int) -> Shapes:
    """Attention of DeepSeek-V3: 4 heads of 32 + 16 for queries and keys, 32 for values."""
    return {
        f"{layer}.q_a_proj.weight": (64, hidden),
        f"{layer}.q_a_layernorm.weight": (64,),
        f"{layer}.q_b_proj.weight": (4 * 48, 64),
        f"{layer}.kv_a_proj_with_mqa.weight": (64 + 16, hidden),
        f"{layer}.kv_a_layernorm.weight": (64,),
        f"{layer}.kv_b_proj.weight": (4 * 64, 64),
        f"{layer}.o_proj.weight": (hidden, 4 * 32),
    }


def _kimi_shapes(prefix: str) -> Shapes:
    hidden, width = 128, 64
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (64, hidden)}
    for number in range(2):
        layer = f"{prefix}model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            **_latent_attention(f"{layer}.self_attn", hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        if number == 0:
            shapes |= _mlp(f"{layer}.mlp", hidden, 256)
            continue
        experts = f"{layer}.mlp.experts"
        shapes |= {
            f"{layer}.mlp.gate.weight": (EXPERTS, hidden),
            f"{layer}.mlp.gate.e_score_correction_bias": (EXPERTS,),
            **dict(_experts(experts, ("gate_proj", "up_proj", "down_proj"), hidden, width)),
            **_mlp(f"{layer}.mlp.shared_experts", hidden, width),
        }
    shapes |= {f"{prefix}model.norm.weight": (hidden,), f"{prefix}lm_head.weight": (64, hidden)}
    return shapes


_KIMI = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    **_COMMON,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}
_KIMI_PLAIN = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
)


def _kimi_k2() -> Model:
    experts = "model.layers.1.mlp.experts"
    return Model(
        name="kimi_k2",
        config=_KIMI,
        shapes=_kimi_shapes(""),
        linears=r".*\.experts\.\d+\.\w+_proj",
        plain=_KIMI_PLAIN,
        router="re:.*self_attn.*",
        spare=f"{experts}.0.down_proj",
        target=f"{experts}.2.down_proj",
        twin=f"{experts}.1.down_proj",
        expert=f"{experts}.2",
        norm="model.layers.0.input_layernorm.weight",
        float32="e_score_correction_bias",
    )


def _kimi_k25() -> Model:
    language = "language_model."
    block = "vision_tower.encoder.blocks.0"
    vision: Shapes = {
        "vision_tower.patch_embed.proj.weight": (64, 3, 14, 14),
        "vision_tower.patch_embed.proj.bias": (64,),
        "vision_tower.patch_embed.pos_emb.weight": (4, 4, 64),
        f"{block}.norm0.weight": (64,),
        f"{block}.norm0.bias": (64,),
        f"{block}.norm1.weight": (64,),
        f"{block}.norm1.bias": (64,),
        f"{block}.mlp.fc0.weight": (128, 64),
        f"{block}.mlp.fc0.bias": (128,),
        f"{block}.mlp.fc1.weight": (64, 128),
        f"{block}.mlp.fc1.bias": (64,),
        f"{block}.wqkv.weight": (192, 64),
        f"{block}.wqkv.bias": (192,),
        f"{block}.wo.weight": (64, 64),
        f"{block}.wo.bias": (64,),
        "vision_tower.encoder.final_layernorm.weight": (64,),
        "vision_tower.encoder.final_layernorm.bias": (64,),
        "mm_projector.pre_norm.weight": (64,),
        "mm_projector.pre_norm.bias": (64,),
        "mm_projector.proj.0.weight": (256, 256),
        "mm_projector.proj.0.bias": (256,),
        "mm_projector.proj.2.weight": (128, 256),
        "mm_projector.proj.2.bias": (128,),
    }
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "text_config": _KIMI,
        "vision_config": {
            "model_type": "kimi_k25_vision",
            "patch_size": 14,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "pos_emb_time": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "merge_kernel_size": [2, 2],
        },
    }
    experts = f"{language}model.layers.1.mlp.experts"
    return Model(
        name="kimi_k25",
        config=config,
        shapes=_kimi_shapes(language) | vision,
        linears=r".*\.experts\.\d+\.\w+_proj",
        plain=_KIMI_PLAIN,
        router="re:.*self_attn.*",
        spare=f"{experts}.0.down_proj",
        target=f"{experts}.2.down_proj",
        twin=f"{experts}.1.down_proj",
        expert=f"{experts}.2",
        norm=f"{language}model.layers.0.input_layernorm.weight",
        float32="e_score_correction_bias",
    )


def _deepseek_v4() -> Model:
    hidden, head, heads, width, streams = 128, 64, 4, 128, 4
    mixes = streams * (streams + 2)
    shapes: Shapes = {"embed.weight": (64, hidden)}
    for number in range(2):
        layer = f"layers.{number}"
        shapes |= {
            f"{layer}.attn.attn_sink": (heads,),
            f"{layer}.attn.kv_norm.weight": (head,),
            f"{layer}.attn.q_norm.weight": (128,),
            f"{layer}.attn.wkv.weight": (head, hidden),
            f"{layer}.attn.wo_a.weight": (128, 128),
            f"{layer}.attn.wo_b.weight": (hidden, 128),
            f"{layer}.attn.wq_a.weight": (128, hidden),
            f"{layer}.attn.wq_b.weight": (heads * head, 128),
            f"{layer}.attn_norm.weight": (hidden,),
            f"{layer}.ffn.gate.weight": (EXPERTS, hidden),
            f"{layer}.ffn.gate.bias": (EXPERTS,),
            **dict(_experts(f"{layer}.ffn.experts", ("w1", "w3", "w2"), hidden, width)),
            f"{layer}.ffn.shared_experts.w1.weight": (width, hidden),
            f"{layer}.ffn.shared_experts.w3.weight": (width, hidden),
            f"{layer}.ffn.shared_experts.w2.weight": (hidden, width),
            f"{layer}.ffn_norm.weight": (hidden,),
        }
        for part in ("attn", "ffn"):
            shapes |= {
                f"{layer}.hc_{part}_base": (mixes,),
                f"{layer}.hc_{part}_fn": (mixes, streams * hidden),
                f"{layer}.hc_{part}_scale": (3,),
            }
    shapes |= {
        "hc_head_base": (streams,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_scale": (1,),
        "norm.weight": (hidden,),
        "head.weight": (64, hidden),
    }
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **_COMMON,
        "expert_dtype": "fp4",
        "hidden_size": hidden,
        "head_dim": head,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "moe_intermediate_size": width,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 0,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 128,
        "o_lora_rank": 64,
        "o_groups": 2,
        "qk_rope_head_dim": 32,
        "index_head_dim": 64,
        "index_n_heads": 2,
        "index_topk": 512,
        "compress_ratios": [0, 0],
        "hc_mult": streams,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "sliding_window": 128,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.5,
        "rope_theta": 10000,
    }
    return Model(
        name="deepseek_v4",
        config=config,
        shapes=shapes,
        linears=r".*\.(w[123]|wkv|wo_[ab]|wq_[ab])",
        plain=(),
        router="layers.1.ffn.gate",
        spare="layers.0.attn.wo_b",
        target="layers.1.ffn.experts.2.w2",
        twin="layers.1.ffn.experts.1.w2",
        expert="layers.1.ffn.experts.2",
        norm="layers.0.attn_norm.weight",
        float32=r"attn_sink|gate\.bias|hc_",
    )


_MAKERS: tuple[Callable[[], Model], ...] = (
    _qwen3_moe,
    _llama,
    _gpt_oss,
    _kimi_k2,
    _kimi_k25,
    _deepseek_v4,
)
MODELS = {model.name: model for model in (make() for make in _MAKERS)}
