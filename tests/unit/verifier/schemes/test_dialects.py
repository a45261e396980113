# SPDX-License-Identifier: Apache-2.0
"""What configs of every dialect say about modules, and what of them is not understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verifier.checkpoint import open_checkpoint
from verifier.schemes import Declaration, parse, read_declarations

Q = "model.layers.3.self_attn.q_proj"
UP = "model.layers.3.mlp.experts.7.up_proj"
GATE = "model.layers.3.mlp.gate"
EMBED = "model.embed_tokens"
NORM = "model.layers.3.input_layernorm"


def answer(
    config: dict[str, Any], module: str, whole: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Return (how it is said, the format's name, its bits, its block) for a module."""
    found = parse(config, "config.json", whole).declared_for(module)
    fmt = found.format
    return (found.via, fmt.name, fmt.bits, fmt.block) if fmt else (found.via, found.algo)


# compressed-tensors


def args(
    bits: int, kind: str, strategy: str, group: int | None = None, **more: Any
) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group} | more


def ct(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": g for i, g in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named} | more


def group(weights: dict[str, Any] | None, *targets: str, **more: Any) -> dict[str, Any]:
    return {"targets": list(targets or ["Linear"]), "weights": weights} | more


NVFP4 = args(4, "float", "tensor_group", 16)
CT_FORMATS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "nvfp4-pack-quantized": (NVFP4, ("nvfp4_ct", 4, (1, 16))),
    "mxfp4-pack-quantized": (args(4, "float", "group", 32), ("mxfp4", 4, (1, 32))),
    "mxfp6-pack-quantized": (args(6, "float", "group", 32), ("mxfp6_e2m3", 6, (1, 32))),
    "mxfp8-quantized": (args(8, "float", "group", 32), ("mxfp8", 8, (1, 32))),
    "float-quantized": (args(8, "float", "tensor"), ("fp8", 8, None)),
    "naive-quantized": (args(8, "float", "channel"), ("fp8_per_channel", 8, None)),
    "pack-quantized": (args(3, "int", "group", 64), ("int_packed", 3, (1, 64))),
    "int-quantized": (args(8, "int", "channel"), ("int8", 8, None)),
}


@pytest.mark.parametrize("named", CT_FORMATS)
def test_formats_of_compressed_tensors(named: str) -> None:
    weights, wanted = CT_FORMATS[named]
    for config in (
        ct(group(weights), format=named),
        ct(group(weights, format=named), format="mixed-precision"),
    ):
        assert answer(config, Q) == ("class", *wanted)
        declaration = parse(config, "config.json")
        assert declaration.understood
        assert declaration.conflicts == ()
        assert declaration.algo == named


@pytest.mark.parametrize(
    ("weights", "named", "wanted"),
    [
        (
            args(8, "float", "block", None, block_structure=[128, 128]),
            "float-quantized",
            ("fp8_block", 8, (128, 128)),
        ),
        (
            args(8, "float", "block", None, block_structure=[64, 128]),
            "float-quantized",
            ("fp8_block", 8, (64, 128)),
        ),
        (args(8, "int", "group", 128), "pack-quantized", ("int_packed", 8, (1, 128))),
        (args(8, "int", "channel"), "pack-quantized", ("int_packed", 8, None)),
        (args(4, "int", "channel"), "pack-quantized", ("int_packed", 4, None)),
        (args(4, "int", "channel", -1), "pack-quantized", ("int_packed", 4, None)),
        (
            {"num_bits": 4, "type": "int", "group_size": 32},
            "pack-quantized",
            ("int_packed", 4, (1, 32)),
        ),
        ({"num_bits": 8, "type": "float"}, "float-quantized", ("fp8", 8, None)),
        (args(8, "int", "group", 64), "int-quantized", ("int8", 8, (1, 64))),
    ],
)
def test_arguments_choose_the_format(
    weights: dict[str, Any], named: str, wanted: tuple[Any, ...]
) -> None:
    assert answer(ct(group(weights), format=named), Q) == ("class", *wanted)


@pytest.mark.parametrize(
    ("preset", "wanted", "inputs"),
    [
        ("NVFP4", "nvfp4_ct", "local"),
        ("NVFP4A16", "nvfp4_ct", "none"),
        ("nvfp4", "nvfp4_ct", "local"),
        ("MXFP4", "mxfp4", "dynamic"),
        ("MXFP8A16", "mxfp8", "none"),
        ("FP8", "fp8", "static"),
        ("FP8_DYNAMIC", "fp8_per_channel", "dynamic"),
        ("FP8_BLOCK", "fp8_block", "dynamic"),
        ("W8A8", "int8", "dynamic"),
        ("W4A16", "int_packed", "none"),
        ("W4A16_ASYM", "int_packed", "none"),
        ("W4AFP8", "int_packed", "dynamic"),
    ],
)
def test_presets(preset: str, wanted: str, inputs: str) -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {preset: ["Linear"]}}
    declaration = parse(config, "config.json")
    assert declaration.understood
    found = declaration.declared_for(Q)
    assert (found.format.name, found.scheme.inputs) == (wanted, inputs)  # type: ignore[union-attr]
    assert found.scheme.symmetric == (preset != "W4A16_ASYM")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("targets", "module", "via"),
    [
        (["Linear"], Q, "class"),
        (["Linear"], UP, "class"),
        (["Linear"], GATE, "class"),
        (["Linear"], "lm_head", "class"),
        (["Linear"], EMBED, "unlisted"),
        (["Linear"], "model.layers.3.pos_embed", "unlisted"),
        (["Linear"], NORM, "unlisted"),
        (["Embedding"], EMBED, "class"),
        (["Embedding"], Q, "unlisted"),
        ([Q], Q, "group"),
        ([Q], UP, "unlisted"),
        (["re:.*experts.*"], UP, "group"),
        (["re:experts.*"], UP, "unlisted"),
        (["re:.*mlp\\.experts\\.\\d+\\.(up|gate)_proj$"], UP, "group"),
        (["RoutedExperts"], UP, "class"),
        (["LlamaAttention"], Q, "unlisted"),
    ],
)
def test_targets(targets: list[str], module: str, via: str) -> None:
    config = ct(group(NVFP4, *targets), format="nvfp4-pack-quantized")
    assert parse(config, "config.json").declared_for(module).via == via


def test_a_name_goes_before_a_class_and_the_first_group_before_the_second() -> None:
    config = ct(
        group(NVFP4, "Linear", format="nvfp4-pack-quantized"),
        group(args(8, "float", "channel"), "re:.*self_attn.*", format="float-quantized"),
        group(args(8, "float", "tensor"), Q, format="float-quantized"),
        format="mixed-precision",
    )
    declaration = parse(config, "config.json")
    assert declaration.declared_for(Q).format.name == "fp8_per_channel"  # type: ignore[union-attr]
    assert declaration.declared_for(UP).format.name == "nvfp4_ct"  # type: ignore[union-attr]
    assert declaration.algo is None
    assert len(declaration.schemes()) == 3
    assert not declaration.mixed


@pytest.mark.parametrize(
    ("ignore", "excluded"),
    [
        (["lm_head", GATE], [GATE]),
        (["re:.*mlp\\.gate$"], [GATE]),
        (["re:.*gate"], [GATE]),
        (["mlp.gate"], []),
        (["model.layers.3"], []),
        (["Linear"], [GATE, Q, UP]),
        (["*gate*"], []),
    ],
)
def test_ignore_is_read_by_name_pattern_and_class(ignore: list[str], excluded: list[str]) -> None:
    config = ct(group(NVFP4), ignore=ignore, format="nvfp4-pack-quantized")
    declaration = parse(config, "config.json")
    assert [m for m in (GATE, Q, UP) if declaration.declared_for(m).algo is None] == excluded


def test_patterns_that_match_nothing_are_dead() -> None:
    config = ct(group(NVFP4), ignore=["lm_head", "re:.*visual.*", "re:.*gate$", "a.b"])
    assert parse(config, "x").exclusions.dead([GATE, Q, "lm_head"]) == ["re:.*visual.*", "a.b"]


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3_moe", True), ("kimi_k2", False), ("", True), (None, True)]
)
def test_routers_are_built_as_the_config_says_in_few_families(
    family: str | None, expected: bool
) -> None:
    whole = {"model_type": family} if family is not None else None
    declaration = parse(ct(group(NVFP4), format="nvfp4-pack-quantized"), "config.json", whole)
    assert declaration.expects(GATE) is expected
    assert declaration.expects(Q)
    assert not declaration.expects("lm_head")
    assert not declaration.expects(NORM)


def test_the_config_of_a_text_model_speaks_of_it_alone() -> None:
    body = ct(group(NVFP4), ignore=["model.layers.0.mlp.up_proj"], format="nvfp4-pack-quantized")
    whole = {"model_type": "kimi_k25", "text_config": {"quantization_config": body}}
    declaration = parse(body, "config.json", whole)
    layers = "language_model.model.layers"
    assert declaration.declared_for(f"{layers}.1.mlp.up_proj").via == "class"
    assert declaration.declared_for(f"{layers}.0.mlp.up_proj").via == "excluded"
    assert declaration.declared_for("vision_tower.encoder.blocks.0.wo").via == "unlisted"
    assert declaration.exclusions.dead([f"{layers}.0.mlp.up_proj"]) == []


UNCLEAR: dict[str, tuple[dict[str, Any], str]] = {
    "a class": (ct(group(NVFP4, "MyLinear")), "targets the class 'MyLinear'"),
    "a pattern": (ct(group(NVFP4, "re:(")), "does not compile"),
    "a pattern of ignore": (ct(group(NVFP4), ignore=["re:("]), "ignore holds"),
    "no targets": (ct({"weights": NVFP4}), "no list of targets"),
    "a width": (ct(group(args(5, "float", "group", 32))), "float 5 group 32"),
    "a strategy": (ct(group(args(8, "float", "token"))), "float 8 token"),
    "a preset": (
        {"quant_method": "compressed-tensors", "config_groups": {"W9A9": ["Linear"]}},
        "is not a preset",
    ),
    "sparse": (
        ct(group(NVFP4), sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}),
        "sparse",
    ),
    "marlin": (ct(group(args(4, "int", "group", 128)), format="marlin-24"), "no longer read"),
    "the cache": (ct(group(NVFP4), kv_cache_scheme="FP8"), "kv_cache_scheme"),
    "no groups": ({"quant_method": "compressed-tensors"}, "no config_groups"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_understood_is_listed(case: str) -> None:
    config, words = UNCLEAR[case]
    declaration = parse(config, "config.json")
    assert not declaration.understood
    assert any(words in text for text in declaration.unclear), declaration.unclear


def test_a_format_that_contradicts_its_arguments_is_a_conflict() -> None:
    declaration = parse(ct(group(NVFP4), format="pack-quantized"), "config.json")
    assert declaration.understood
    assert declaration.conflicts == (
        "config_groups['group_0'] says format 'pack-quantized' and weights float 4 tensor_group 16",
    )
    assert declaration.declared_for(Q).format.name == "nvfp4_ct"  # type: ignore[union-attr]


def test_transforms_are_named() -> None:
    transforms = {
        "config_groups": {"u": {"type": "hadamard", "apply": []}, "v": {"type": "random-hadamard"}}
    }
    declaration = parse(ct(group(NVFP4), transform_config=transforms), "config.json")
    assert declaration.transforms == ("u: hadamard", "v: random-hadamard")
    assert declaration.understood
    assert parse(ct(group(NVFP4), transform_config={}), "config.json").transforms == ()


@pytest.mark.parametrize(
    ("scheme", "kv"),
    [
        (None, None),
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "FP8"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "FP8"),
        ({"num_bits": 8, "type": "int"}, "INT8"),
        ({"num_bits": 4, "type": "float"}, "NVFP4"),
    ],
)
def test_cache_of_compressed_tensors(scheme: Any, kv: str | None) -> None:
    assert parse(ct(group(NVFP4), kv_cache_scheme=scheme), "config.json").kv == kv


# ModelOpt


def modelopt(**more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt"} | more


@pytest.mark.parametrize(
    ("algo", "name", "inputs"),
    [
        ("NVFP4", "nvfp4", "static"),
        ("nvfp4", "nvfp4", "static"),
        ("NVFP4_AWQ", "nvfp4_awq", "static"),
        ("NVFP4_SVD", "nvfp4_svd", "static"),
        ("W4A16_NVFP4", "w4a16_nvfp4", "none"),
        ("W4A8_NVFP4_FP8", "w4a8_nvfp4_fp8", "static"),
        ("W4A8_MXFP4_FP8", "w4a8_mxfp4_fp8", "static"),
        ("mxfp4", "mxfp4", "none"),
        ("MXFP8", "mxfp8", "dynamic"),
        ("FP8", "fp8", "static"),
        ("fp8_pb_wo", "fp8_block", "dynamic"),
        ("fp8_pb_real", "fp8_block", "dynamic"),
        ("FP8_BLOCK_SCALES", "fp8_block", "dynamic"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_per_channel", "dynamic"),
        ("W4A16_AWQ", "int4_awq", "none"),
        ("INT4_AWQ", "int4_awq", "none"),
        ("W4A8_AWQ", "w4a8_awq", "static"),
        ("W8A16", "int8", "none"),
        ("W8A8_SQ_PER_CHANNEL", "int8", "static"),
        ("INT8_SQ", "int8", "static"),
    ],
)
def test_algorithms_of_modelopt_in_any_case(algo: str, name: str, inputs: str) -> None:
    for config in (modelopt(quant_algo=algo), {"quantization": {"quant_algo": algo}}):
        declaration = parse(config, "config.json")
        found = declaration.declared_for(Q)
        assert declaration.understood
        assert (found.via, found.format.name, found.scheme.inputs) == ("uniform", name, inputs)  # type: ignore[union-attr]
    layers = {Q: {"quant_algo": algo}}
    mixed = parse(modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers), "config.json")
    assert mixed.declared_for(Q).format.name == name  # type: ignore[union-attr]


@pytest.mark.parametrize(("group_size", "block"), [(16, (1, 16)), (32, (1, 32)), (None, (1, 16))])
def test_weights_alone_may_be_in_groups_of_32(
    group_size: int | None, block: tuple[int, int]
) -> None:
    config = modelopt(quant_algo="W4A16_NVFP4", group_size=group_size)
    assert answer(config, Q) == ("uniform", "w4a16_nvfp4", 4, block)
    assert answer(modelopt(quant_algo="NVFP4", group_size=32), Q)[-1] == (1, 16)


def test_groups_of_modelopt_are_read_whole() -> None:
    groups = {
        "group_0": group(
            args(8, "float", "tensor"), "a.b", input_activations={"num_bits": 8, "dynamic": False}
        ),
        "group_1": group({"num_bits": 4, "type": "float", "group_size": 16}, "a.c", "a.d"),
    }
    declaration = parse(modelopt(quant_algo="MIXED_PRECISION", config_groups=groups), "config.json")
    assert [(g.name, g.targets, g.scheme.inputs) for g in declaration.groups] == [
        ("group_0", ("a.b",), "static"),
        ("group_1", ("a.c", "a.d"), "none"),
    ]
    assert declaration.group_size == 16


def test_null_activations_of_the_only_group_mean_weights_alone() -> None:
    groups = {"group_0": group({"num_bits": 4, "group_size": 16}, input_activations=None)}
    found = parse(modelopt(quant_algo="NVFP4", config_groups=groups), "x").declared_for(Q)
    assert found.scheme.inputs == "none"  # type: ignore[union-attr]


# FP8 by itself, DeepSeek-V4


def fp8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8"} | more


@pytest.mark.parametrize(
    ("config", "name", "block", "leaf", "inputs"),
    [
        (fp8(weight_block_size=[128, 128]), "fp8_block", (128, 128), "weight_scale_inv", "dynamic"),
        (fp8(weight_block_size=[32, 32]), "mxfp8_block", (32, 32), "weight_scale_inv", "dynamic"),
        (fp8(weight_block_size=[64, 64]), "fp8_block", (64, 64), "weight_scale_inv", "dynamic"),
        (fp8(weight_block_size=None, activation_scheme="static"), "fp8", None, "", "static"),
        (fp8(activation_scheme="dynamic"), "fp8", None, "", "dynamic"),
        (fp8(weight_block_size=[1, 32]), "mxfp8", (1, 32), "", "dynamic"),
    ],
)
def test_fp8_by_itself(
    config: dict[str, Any], name: str, block: Any, leaf: str, inputs: str
) -> None:
    found = parse(config, "config.json").declared_for(Q)
    assert (found.format.name, found.format.block) == (name, block)  # type: ignore[union-attr]
    assert (found.scheme.scale_leaf, found.scheme.inputs) == (leaf, inputs)  # type: ignore[union-attr]


def test_fp8_does_not_expect_heads_and_routers() -> None:
    declaration = parse(fp8(weight_block_size=[128, 128]), "config.json")
    assert [m for m in (Q, UP, GATE, EMBED, "lm_head") if declaration.expects(m)] == [Q, UP]


V4 = {"expert_dtype": "fp4"}
EXPERT, SHARED, WQ = (
    "layers.1.ffn.experts.0.w1",
    "layers.1.ffn.shared_experts.w1",
    "layers.1.attn.wq_a",
)


def test_deepseek_v4_has_experts_of_their_own() -> None:
    config = fp8(weight_block_size=[128, 128], scale_fmt="ue8m0")
    assert answer(config, EXPERT, V4) == ("implied", "mxfp4", 4, (1, 32))
    assert answer(config, SHARED, V4) == ("implied", "fp8_block", 8, (128, 128))
    assert answer(config, WQ, V4) == ("implied", "fp8_block", 8, (128, 128))
    declaration = parse(config, "config.json", V4)
    assert [m for m in (EXPERT, SHARED, WQ, "head") if declaration.expects(m)] == [EXPERT]


def test_deepseek_v4_in_nvfp4_excludes_nothing_from_fp8() -> None:
    config = fp8(
        weight_block_size=[128, 128],
        quant_algo="MIXED_PRECISION",
        moe_quant_algo="NVFP4",
        ignore=["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        quantized_layers={"layers.1.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
    )
    assert answer(config, EXPERT, V4)[1] == "nvfp4"
    assert answer(config, WQ, V4)[1] == "fp8_block"
    assert answer(config, "mtp.0.ffn.experts.0.w1", V4)[1] == "mxfp4"
    declaration = parse(config, "config.json", V4)
    assert not declaration.exclusions.loose(WQ)
    assert declaration.exclusions.dead(["a"]) == []


def test_store_dtype_is_that_of_routed_experts() -> None:
    """As vLLM 0.32 reads it: excluded layers stay plain, all other linear layers are FP8."""
    config = fp8(
        weight_block_size=[128, 128], store_dtype="mxfp4", modules_to_not_convert=[Q, "lm_head"]
    )
    expert = "model.layers.1.mlp.experts.3.down_proj"
    shared = "model.layers.1.mlp.shared_experts.down_proj"
    assert answer(config, expert) == ("implied", "mxfp4", 4, (1, 32))
    assert answer(config, shared)[1:] == ("fp8_block", 8, (128, 128))
    assert answer(config, Q) == ("excluded", None)
    declaration = parse(config, "config.json")
    assert declaration.understood
    assert [m for m in (expert, shared, Q, "lm_head") if declaration.expects(m)] == [expert, shared]


# GPTQ, AWQ, AutoRound


def gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | more


def test_gptq() -> None:
    assert answer(gptq(), Q) == ("implied", "gptq", 4, (1, 128))
    assert answer(gptq(checkpoint_format="gptq_v2"), Q)[1] == "gptq_v2"
    assert answer(gptq(group_size=-1, bits=3), Q) == ("implied", "gptq", 3, None)
    assert parse(gptq(group_size=-1), "x").group_size is None
    assert not parse(gptq(), "x").expects(Q)
    assert not parse(gptq(checkpoint_format="gptq_p"), "x").understood
    assert not parse(gptq(bits="4"), "x").understood


def test_dynamic_patterns_of_gptq() -> None:
    dynamic = {
        "-:.*shared_expert.*": {},
        "+:.*experts.*": {"bits": 8, "group_size": 64},
        ".*q_proj": {"sym": False},
    }
    config = gptq(dynamic=dynamic)
    assert answer(config, "model.layers.0.mlp.shared_expert.up_proj") == ("excluded", None)
    assert answer(config, UP) == ("group", "gptq", 8, (1, 64))
    assert answer(config, "model.layers.3.self_attn.k_proj") == ("implied", "gptq", 4, (1, 128))
    declaration = parse(config, "config.json")
    assert not declaration.declared_for(Q).scheme.symmetric  # type: ignore[union-attr]
    assert declaration.exclude == ("-:.*shared_expert.*",)
    assert declaration.exclusions.dead([Q]) == ["-:.*shared_expert.*"]
    assert declaration.exclusions.loose("model.layers.0.mlp.shared_expert.up_proj")
    assert not parse(gptq(dynamic={"+:(": {}}), "x").understood


def test_a_list_of_quantized_modules_of_gptq() -> None:
    config = gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]])
    assert answer(config, Q)[0] == "implied"
    assert answer(config, GATE) == ("unlisted", None)


def test_awq() -> None:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    }
    assert answer(config, Q) == ("implied", "awq", 4, (1, 128))
    assert answer(config | {"modules_to_not_convert": ["self_attn"]}, Q) == ("excluded", None)
    assert answer(config | {"modules_to_not_convert": None}, Q)[0] == "implied"
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}
    assert answer(old, Q) == ("implied", "awq", 4, (1, 64))
    assert not parse(config | {"version": "gemv"}, "x").understood


def auto_round(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
    } | more


@pytest.mark.parametrize(
    ("config", "name", "block", "inputs"),
    [
        (auto_round(), "gptq", (1, 128), "none"),
        (auto_round(packing_format="auto_round:auto_awq"), "awq", (1, 128), "none"),
        (auto_round(packing_format="auto_round:llm_compressor"), "int_packed", (1, 128), "none"),
        (
            auto_round(
                data_type="nv_fp4_with_static_gs",
                group_size=16,
                act_bits=4,
                packing_format="auto_round:llm_compressor",
            ),
            "nvfp4_ct",
            (1, 16),
            "local",
        ),
        (auto_round(data_type="mx_fp", group_size=32), "mxfp4", (1, 32), "none"),
        (
            auto_round(data_type="mx_fp", group_size=32, bits=8, act_bits=8),
            "mxfp8",
            (1, 32),
            "dynamic",
        ),
        (
            auto_round(
                data_type="fp", bits=8, group_size=[128, 128], packing_format="auto_round:fp8"
            ),
            "fp8_block",
            (128, 128),
            "none",
        ),
        (
            auto_round(data_type="fp", bits=8, group_size=-1, act_bits=8, act_dynamic=False),
            "fp8",
            None,
            "static",
        ),
    ],
)
def test_formats_of_auto_round(config: dict[str, Any], name: str, block: Any, inputs: str) -> None:
    declaration = parse(config, "config.json")
    assert declaration.understood
    found = declaration.declared_for(Q)
    assert (found.format.name, found.format.block) == (name, block)  # type: ignore[union-attr]
    assert found.scheme.inputs == inputs  # type: ignore[union-attr]


def test_exceptions_of_auto_round() -> None:
    config = auto_round(
        block_name_to_quantize="model.layers,other.blocks",
        extra_config={
            GATE: {"bits": 16, "data_type": "fp"},
            ".*self_attn.*": {"bits": 8, "group_size": 32},
            "lm_head": {"bits": 16},
        },
    )
    assert answer(config, UP) == ("uniform", "gptq", 4, (1, 128))
    assert answer(config, GATE) == ("excluded", None)
    assert answer(config, Q) == ("exact", "gptq", 8, (1, 32))
    assert answer(config, "model.lm_head") == ("excluded", None)
    assert answer(config, "model.visual.blocks.0.fc1") == ("unlisted", None)
    assert answer(auto_round(), "lm_head") == ("unlisted", None)
    declaration = parse(config, "config.json")
    assert declaration.expects(UP)
    assert not declaration.expects(GATE)


# Quark


def spec(dtype: str, qscheme: str, size: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "qscheme": qscheme,
        "group_size": size,
        "is_dynamic": False,
        "symmetric": True,
    } | more


def quark(weight: Any, inputs: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": inputs},
        "exclude": ["lm_head", "re:.*mlp\\.gate$"],
        "layer_quant_config": {},
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
    } | more


DYNAMIC = {"is_dynamic": True}


@pytest.mark.parametrize(
    ("weight", "inputs", "name", "how"),
    [
        (spec("fp4", "per_group", 32, scale_format="e8m0"), DYNAMIC, "mxfp4", "dynamic"),
        (spec("fp4", "per_group", 32), spec("fp8_e4m3", "per_tensor"), "w4a8_mxfp4_fp8", "static"),
        (spec("fp6_e2m3", "per_group", 32), DYNAMIC, "mxfp6_e2m3", "dynamic"),
        (spec("fp6_e3m2", "per_group", 32), DYNAMIC, "mxfp6_e3m2", "dynamic"),
        (spec("fp8_e4m3", "per_group", 32), DYNAMIC, "mxfp8", "dynamic"),
        (spec("fp8_e4m3", "per_tensor"), spec("fp8_e4m3", "per_tensor"), "fp8", "static"),
        (spec("fp8_e4m3", "per_channel"), DYNAMIC, "fp8_per_channel", "dynamic"),
        (spec("fp8_e4m3", "per_block", block_size=[128, 128]), DYNAMIC, "fp8_block", "dynamic"),
        (spec("fp8_e4m3", "per_block", block_size=[32, 32]), DYNAMIC, "mxfp8_block", "dynamic"),
        (spec("int8", "per_channel"), DYNAMIC, "int8", "dynamic"),
        (spec("int4", "per_group", 128), None, "int4_quark", "none"),
        (spec("uint4", "per_group", 128, symmetric=False), None, "uint4_quark", "none"),
        (
            [spec("fp4", "per_group", 16), spec("fp8_e4m3", "per_tensor")],
            [spec("fp4", "per_group", 16), spec("fp8_e4m3", "per_tensor")],
            "nvfp4_quark",
            "local",
        ),
    ],
)
def test_formats_of_quark(weight: Any, inputs: Any, name: str, how: str) -> None:
    declaration = parse(quark(weight, inputs), "config.json")
    assert declaration.understood, declaration.unclear
    found = declaration.declared_for(Q)
    assert (found.format.name, found.scheme.inputs) == (name, how)  # type: ignore[union-attr]
    assert declaration.declared_for(GATE).via == "excluded"
    assert declaration.expects(Q)
    assert not declaration.expects(GATE)


def test_layers_of_quark_have_recipes_of_their_own() -> None:
    layers = {
        "*self_attn*": {"weight": spec("fp8_e4m3", "per_tensor"), "input_tensors": DYNAMIC},
        "re:.*experts\\.\\d+\\.up_proj": {"weight": spec("int8", "per_channel")},
        "*k_proj": {"output_tensors": spec("fp8_e4m3", "per_tensor")},
    }
    config = quark(spec("fp4", "per_group", 32), DYNAMIC, layer_quant_config=layers)
    config["export"] = {"kv_cache_group": ["*k_proj", "*v_proj"], "pack_method": "order"}
    assert answer(config, Q)[:2] == ("group", "fp8")
    assert answer(config, UP)[:2] == ("group", "int8")
    assert answer(config, "model.layers.0.mlp.experts.0.down_proj")[:2] == ("uniform", "mxfp4")
    assert parse(config, "config.json").kv == "FP8"
    four = quark(spec("int4", "per_group", 128), export={"pack_method": "order"})
    assert answer(four, Q)[1] == "int4_quark_order"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (quark(spec("int3", "per_group", 128)), "int3"),
        (quark([spec("fp8_e4m3", "per_tensor"), spec("int4", "per_channel")]), "over"),
        (quark(spec("int8", "per_channel"), layer_type_quant_config={"Linear": {}}), "layer_type"),
        (quark(spec("int8", "per_channel"), exclude=["re:("]), "does not compile"),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": spec("int8", "per_channel")},
            },
            "export",
        ),
    ],
)
def test_what_of_quark_is_not_understood(config: dict[str, Any], words: str) -> None:
    declaration = parse(config, "config.json")
    assert not declaration.understood
    assert any(words in text for text in declaration.unclear), declaration.unclear


# the rest


@pytest.mark.parametrize(
    ("config", "module", "wanted"),
    [
        ({"quant_method": "mxfp4"}, UP, ("uniform", "mxfp4", 4, (1, 32))),
        ({"quant_method": "mxfp4"}, Q, ("unlisted", None)),
        ({"quant_method": "fbgemm_fp8"}, Q, ("implied", "fp8_per_channel", 8, None)),
        ({"quant_method": "w4afp8"}, UP, ("uniform", "w4afp8", 4, (1, 128))),
        ({"quant_method": "w4afp8"}, Q, ("implied", "fp8_block", 8, (128, 128))),
        ({"bits": 4, "group_size": 64}, Q, ("implied", "mlx_affine", 4, (1, 64))),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, Q, ("implied", "mlx_mxfp4", 4, (1, 32))),
        ({"bits": 4, "group_size": 64, Q: {"bits": 8}}, Q, ("exact", "mlx_affine", 8, (1, 64))),
        ({"bits": 4, "group_size": 64, Q: False}, Q, ("excluded", None)),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            Q,
            ("implied", "bnb_4bit", 4, (1, 64)),
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            Q,
            ("implied", "bnb_int8", 8, None),
        ),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_8bit": True,
                "llm_int8_skip_modules": ["attn"],
            },
            Q,
            ("excluded", None),
        ),
        (
            {"quant_method": "torchao", "quant_type": {"default": {}}},
            Q,
            ("implied", "torchao", 8, None),
        ),
    ],
)
def test_other_dialects(config: dict[str, Any], module: str, wanted: tuple[Any, ...]) -> None:
    assert answer(config, module) == wanted
    assert parse(config, "config.json").understood
    assert not parse(config, "config.json").expects(Q)


def test_a_method_of_its_own_is_foreign() -> None:
    declaration = parse({"quant_method": "dv_hadamard", "bits": 4}, "config.json")
    assert (declaration.form, declaration.method) == ("foreign", "dv_hadamard")
    assert not declaration.understood


def _write(folder: Path, **files: Any) -> Path:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "form", "file"),
    [
        ({"config": {"quantization": {"bits": 4, "group_size": 64}}}, "mlx", "config.json"),
        ({"config": {"compression_config": ct(group(NVFP4))}}, "compressed-tensors", "config.json"),
        (
            {"config": {}, "quantize_config": {"bits": 4, "group_size": 128}},
            "gptq",
            "quantize_config.json",
        ),
        (
            {"config": {}, "quant_config": {"w_bit": 4, "q_group_size": 128}},
            "awq",
            "quant_config.json",
        ),
        (
            {"config": {}, "quantization_config": auto_round()},
            "auto-round",
            "quantization_config.json",
        ),
        (
            {"config": {"quantization_config": gptq()}, "quantization_config": auto_round()},
            "gptq",
            "config.json",
        ),
    ],
)
def test_files_that_hold_a_config(
    files: dict[str, Any], form: str, file: str, tmp_path: Path
) -> None:
    found = read_declarations(open_checkpoint(_write(tmp_path, **files))).effective
    assert isinstance(found, Declaration)
    assert (found.form, found.file) == (form, file)


ODD: list[Any] = [None, True, 0, -1, 1.5, "x", [], [None], [[]], {}, {"a": None}, {"a": {"b": 3}}]
STARTS = [
    ct(
        group(NVFP4),
        format="x",
        ignore=[],
        kv_cache_scheme={},
        transform_config={},
        sparsity_config={},
    ),
    fp8(weight_block_size=[128, 128], moe_quant_algo="NVFP4", ignore=[], quantized_layers={}),
    gptq(dynamic={}, modules_in_block_to_quantize=[], checkpoint_format="gptq"),
    {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": [],
        "version": "",
    },
    auto_round(
        extra_config={}, block_name_to_quantize="", act_bits=4, act_data_type="", act_dynamic=1
    ),
    quark(
        spec("int8", "per_channel"), DYNAMIC, layer_type_quant_config={}, kv_cache_quant_config={}
    ),
    {"bits": 4, "group_size": 64, "mode": "affine", Q: {}},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": []},
    {"quant_method": "torchao", "quant_type": {}, "modules_to_not_convert": []},
]


@pytest.mark.parametrize("start", STARTS, ids=lambda s: str(s.get("quant_method", "mlx")))
def test_odd_values_of_any_field_never_raise(start: dict[str, Any]) -> None:
    paths: list[tuple[str, ...]] = [(key,) for key in start]
    paths += [
        (key, inner) for key, value in start.items() if isinstance(value, dict) for inner in value
    ]
    for path in paths:
        for value in ODD:
            config = json.loads(json.dumps(start))
            node = config
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            declaration = parse(config, "config.json", {"quantization_config": config})
            for module in (Q, UP, GATE, "lm_head"):
                found = declaration.declared_for(module)
                assert found.group_size is None or type(found.group_size) is int
                declaration.expects(module)
            declaration.exclusions.dead([Q])
