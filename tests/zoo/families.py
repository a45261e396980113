# SPDX-License-Identifier: Apache-2.0
"""The families of the zoo: every class of transformers with fused experts, and a small config for
each, made here.

A config is the class's own defaults with `NUMBERS` (`TOWER` for vision and audio) wherever it has
the key, and what a family needs beside them. Dimensions are multiples of 32, the widest block of
the recipes, and telling: no two are equal that mean different things, so that a transposed or
swapped tensor shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HARD = (
    "minimax_m2",
    "minimax_m3_vl",
    "qwen3_5_moe",
    "glm_moe_dsa",
    "qwen3_moe",
    "mixtral",
    "nemotron_h",
    "gpt_oss",
    "llama4",
    "dbrx",
    "qwen3_vl_moe",
)
"""Always among those tried."""
NUMBERS: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 96,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "shared_expert_intermediate_size": 160,
    "shared_experts_intermediate_size": 160,
    "shared_intermediate_size": 160,
    "moe_shared_expert_intermediate_size": 160,
    "dense_intermediate_size": 192,
    "moe_hidden_size": 64,
    "intermediate_size_mlp": 192,
    "share_expert_dim": 160,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ("dense", "sparse"),
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "gated_norm_rank": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_topk_blocks": 2,
    "index_block_size": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "mamba_d_state": 16,
    "mamba_dt_rank": 32,
    "mamba_d_head": 32,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "attention_chunk_size": 32,
    "rel_extent": 32,
    "hc_lowrank": 32,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320,
    "router_hidden_size": 32,
    "kv_channels": 32,
    "unpadded_vocab_size": 320,
    "layer_group_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "sep_token_id": 0,
    "eod_token_id": 0,
}
TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "depth": 1,
    "n_layers": 1,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 56,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "deepstack_visual_indexes": (0,),
    "projector_hidden_size": 64,
    "mlp_dim": 96,
    "output_channels": 32,
    "text_hidden_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "output_dim": 64,
    "downsample_hidden_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "position_embedding_size": 64,
}
DEFAULT = object()
"""In a family's own numbers: as the class has it."""
TOWERS = ("vision", "audio", "sam_config", "encoder_config", "code2wav", "code_predictor")


@dataclass(frozen=True)
class Family:
    """A model of the zoo: its config's ``model_type``, the class that is built, and what its config
    needs beside.
    """

    name: str
    architecture: str
    more: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""

    @property
    def config_type(self) -> str:
        """The model_type to ask transformers for."""
        return self.model_type or self.name


def _text(**more: Any) -> dict[str, Any]:
    return {"text_config": more}


FAMILIES: tuple[Family, ...] = (
    Family("afmoe", "AfmoeForCausalLM"),
    Family("aria", "AriaForConditionalGeneration"),
    Family("axk1", "AXK1ForCausalLM"),
    Family("axk2", "AXK2ForCausalLM"),
    Family("bailing_hybrid", "BailingHybridForCausalLM"),
    Family("beam", "BeamForCausalLM"),
    Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    Family(
        "dbrx",
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 96,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 64,
            },
        },
    ),
    Family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    ),
    Family("deepseek_v2", "DeepseekV2ForCausalLM"),
    Family("deepseek_v3", "DeepseekV3ForCausalLM"),
    Family("deepseek_v32", "DeepseekV32ForCausalLM"),
    Family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        {
            "mlp_layer_types": ["hash_moe", "moe"],
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        },
    ),
    Family("diffusion_gemma", "DiffusionGemmaForBlockDiffusion"),
    Family("dots1", "Dots1ForCausalLM"),
    Family(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        {
            "text_config": {"num_key_value_heads": 4},
            "vision_config": {
                "num_hidden_layers": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "moe_intermediate_size": 64,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
            },
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
        },
    ),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        _text(
            moe_intermediate_size=[96, 32],
            head_dim=DEFAULT,
            hidden_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
    ),
    Family("exaone_moe", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("flint", "FlintForCausalLM", {"mlp_only_layers": [0]}),
    Family(
        "gemma4", "Gemma4ForConditionalGeneration", _text(enable_moe_block=True, top_k_experts=2)
    ),
    Family("gemma4_text", "Gemma4ForCausalLM", {"enable_moe_block": True, "top_k_experts": 2}),
    Family("glm4_moe", "Glm4MoeForCausalLM"),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        _text(
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
        ),
    ),
    Family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        _text(
            num_key_value_heads=4,
            index_kpool=4,
            qk_rope_head_dim=0,
            layer_types=["linear_attention", "indexed_attention"],
        ),
    ),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    Family("gpt_oss", "GptOssForCausalLM"),
    Family("granitemoe", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Family("hy_v3", "HYV3ForCausalLM"),
    Family("hy_v4", "HYV4ForCausalLM"),
    Family(
        "inkling",
        "InklingForConditionalGeneration",
        {"audio_config": {"mel_vocab_size": 16, "n_mel_bins": 8}},
        model_type="inkling_mm_model",
    ),
    Family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        {"vision_config": {"projection_hidden_dim": 96}},
    ),
    Family(
        "jamba",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    Family("jetmoe", "JetMoeForCausalLM"),
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family("kolibri1", "Kolibri1ForCausalLM"),
    Family("laguna", "LagunaForCausalLM"),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "vision_config": {
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "vision_output_dim": 64,
                "intermediate_size": 128,
            }
        },
    ),
    Family("llama4_text", "Llama4ForCausalLM"),
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        {
            "num_layers": 2,
            "head_dim": 32,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 96,
            "ffn_hidden_size": 128,
        },
    ),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    Family("minimax", "MiniMaxForCausalLM"),
    Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    Family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        {"projector_hidden_size": 64}
        | _text(
            num_hidden_layers=3,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention", "full_attention", "minimax_m3_sparse"],
        ),
    ),
    Family("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM"),
    Family("mistral4", "Mistral4ForCausalLM"),
    Family("mistral_large4", "MistralLarge4ForConditionalGeneration"),
    Family("mixtral", "MixtralForCausalLM"),
    Family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        {
            "projector_hidden_size": 64,
            "audio_config": {
                "num_hidden_layers": 4,
                "hidden_sizes": [16, 16, 32, 32],
                "depths": [1, 1, 1, 1],
            },
        },
    ),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        },
    ),
    Family("olmoe", "OlmoeForCausalLM"),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    Family("phimoe", "PhimoeForCausalLM"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        _text(layer_types=["linear_attention", "full_attention"]),
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family("qwen3_moe", "Qwen3MoeForCausalLM"),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        {
            "talker_config": {
                "spatial_merge_size": 2,
                "num_code_groups": 2,
                "code_predictor_config": {"num_code_groups": 2},
            }
            | _text(shared_expert_intermediate_size=160),
            "code2wav_config": {
                "decoder_dim": 32,
                "codebook_size": 64,
                "num_quantizers": 2,
                "upsample_rates": (2, 2),
            },
        },
    ),
    Family("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    Family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _text(tie_word_embeddings=False)),
    Family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        _text(
            layer_types=["linear_attention", "full_attention"],
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=32,
            indexer_budget=16,
            indexer_compress_ratio=4,
        ),
    ),
    Family("solar_open", "SolarOpenForCausalLM"),
    Family("step3p7", "Step3p7ForConditionalGeneration"),
    Family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    ),
    Family("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1}),
)
BY_NAME: Mapping[str, Family] = {f.name: f for f in FAMILIES}


def arguments(cls: Any, more: Mapping[str, Any], tower: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of a small config of a class, its sub-configs' as nested dicts.

    Args:
        cls: a config class of transformers.
        more: what goes over the numbers, nested as the config is; `DEFAULT` takes a number away.
        tower: whether it is a vision or audio part.
    """
    base, numbers = cls(), TOWER if tower else NUMBERS
    known = vars(base).keys() | getattr(cls, "attribute_map", {}).keys()
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items() if k in known}
    if (
        "kv_lora_rank" in given
    ):  # these classes have as many key heads as query heads, of a width that they derive
        given = {k: v for k, v in given.items() if k != "head_dim"} | {
            "num_key_value_heads": given["num_attention_heads"]
        }
    for key, sub in (getattr(cls, "sub_configs", None) or {}).items():
        own = vars(base).get(key)
        kind = type(own) if hasattr(own, "to_dict") else sub
        below = more.get(key) or {}
        if not hasattr(kind, "model_type") or kind.__name__ == "AutoConfig":
            continue
        given[key] = arguments(kind, below, tower or any(t in key for t in TOWERS))
        if kind.model_type:
            given[key]["model_type"] = kind.model_type
    for key, value in more.items():
        if not (isinstance(value, Mapping) and isinstance(given.get(key), dict)):
            given[key] = value
    return {k: v for k, v in given.items() if v is not DEFAULT}


def config(family: Family) -> Any:
    """Return the small config of a family.

    Raises:
        KeyError: transformers does not have it.
    """
    import transformers

    cls = transformers.CONFIG_MAPPING[family.config_type]
    return cls(**arguments(cls, family.more))


def model(family: Family) -> Any:
    """Return a small model of a family, its values seeded by its name, in bfloat16 as checkpoints
    are.
    """
    import torch
    import transformers

    made = config(family)
    torch.manual_seed(sum(family.name.encode()))
    built = getattr(transformers, family.architecture)._from_config(made, dtype=torch.bfloat16)
    return built.eval()
