# SPDX-License-Identifier: Apache-2.0
"""Roles, groups, formats, the dialects of declarations and exclusions, and the layouts of the
families.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.paths import TESTS
from verifier.checkpoint import Tensor, open_checkpoint
from verifier.errors import ContentError
from verifier.layouts.family import Family, family_of, known, load
from verifier.schemes import (
    FORMAT_OF_ALGO,
    FORMATS,
    KNOWN_ALGOS,
    PACKED,
    ROLES,
    Declaration,
    Entry,
    Exclusions,
    ExpertKey,
    Module,
    canonical,
    collapse,
    expert_key,
    fused_groups,
    gather,
    layer_of,
    packed_name,
    parse,
    read_declarations,
    role,
    split,
)

MODELOPT = TESTS / "data" / "modelopt"
M3 = "language_model.model.layers.5."


def _tensor(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (4, 32)) -> Tensor:
    return Tensor(name, dtype, shape, "model.safetensors", 0, 0)


def _module(**parts: tuple[str, tuple[int, ...]]) -> Module:
    """Return a module of (dtype, shape) by leaf; ``bare`` is a parameter without a leaf."""
    leaves = {
        "" if leaf == "bare" else leaf: _tensor(f"m.{leaf}", *part) for leaf, part in parts.items()
    }
    return Module("m", leaves)


# roles and names


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("language_model.model.embed_tokens", "embedding"),
        ("lm_head", "lm_head"),
        ("language_model.lm_head", "lm_head"),
        ("model.norm", "norm"),
        ("model.layers.0.input_layernorm", "norm"),
        ("model.layers.0.self_attn.q_norm", "norm"),
        (f"{M3}self_attn.k_norm", "norm"),
        ("model.layers.0.self_attn.kv_a_layernorm", "norm"),
        ("transformer.ln_f", "norm"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkv", "attention"),
        ("model.layers.0.self_attn.kv_b_proj", "attention"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("model.layers.0.feed_forward.w1", "mlp"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("model.layers.0.mlp.router", "router"),
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        (f"{M3}block_sparse_moe.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.experts.7.gate_proj", "routed_expert"),
        ("model.layers.0.mlp.experts.7.down_proj", "routed_expert"),
        (f"{M3}block_sparse_moe.experts.127.w2", "routed_expert"),
        ("model.layers.0.mlp.experts.gate_up_proj", "routed_expert"),
        ("model.layers.0.mlp.experts.down_proj", "routed_expert"),
        ("model.layers.0.mlp.shared_experts.gate_proj", "shared_expert"),
        ("model.layers.0.mlp.shared_expert.up_proj", "shared_expert"),
        (f"{M3}self_attn.index_q_proj", "indexer"),
        (f"{M3}self_attn.indexer.k_proj", "indexer"),
        ("mtp.layers.0.self_attn.q_proj", "mtp"),
        ("mtp.fc", "mtp"),
        ("mtp.layers.0.mlp.experts.3.up_proj", "mtp"),
        ("vision_tower.layers.3.self_attn.q_proj", "vision"),
        ("model.visual.blocks.0.norm1", "vision"),
        ("audio_tower.layers.0.fc1", "vision"),
        ("vision_tower.embeddings.proj", "vision"),
        ("multi_modal_projector.linear_1", "projector"),
        ("patch_merge_mlp.linear_2", "projector"),
        ("model.visual.merger.mlp.0", "projector"),
        ("something.else", "other"),
        ("", "other"),
    ],
)
def test_role_of_a_module(module: str, wanted: str) -> None:
    assert role(module) == wanted
    assert wanted in ROLES


def test_gate_proj_is_no_router_and_gate_no_projection() -> None:
    assert role("model.layers.0.mlp.gate_proj") != role("model.layers.0.mlp.gate")
    assert role("model.layers.0.mlp.experts.0.gate_proj") == "routed_expert"


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("a.mlp.experts.0.gate_proj", ExpertKey("a.mlp.experts", 0, "gate_proj")),
        (
            f"{M3}block_sparse_moe.experts.127.w3",
            ExpertKey(f"{M3}block_sparse_moe.experts", 127, "w3"),
        ),
        ("a.experts.3.inner.experts.4.w1", ExpertKey("a.experts.3.inner.experts", 4, "w1")),
        ("a.mlp.experts.gate_up_proj", None),
        ("a.mlp.experts.0", None),
        ("a.mlp.experts.0.gate_proj.weight", None),
        ("a.shared_experts.0.w1", None),
        ("experts.0.w1", None),
        ("a.mlp.experts.x.w1", None),
        ("", None),
    ],
)
def test_expert_key(module: str, wanted: ExpertKey | None) -> None:
    assert expert_key(module) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.12.mlp.gate", 12),
        ("layers.0.x", 0),
        ("transformer.h.3.mlp", 3),
        ("visual.blocks.7.attn", 7),
        ("model.layers.1.inner.layers.2.x", 2),
        ("model.norm", None),
        ("model.layers.x.y", None),
        ("players.3.x", None),
    ],
)
def test_layer_of(name: str, wanted: int | None) -> None:
    assert layer_of(name) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "model.layers.10.mlp.experts.3.w1.weight_scale_2",
            "model.layers.*.mlp.experts.*.w1.weight_scale_2",
        ),
        ("model.layers.10", "model.layers.*"),
        ("0.weight", "0.weight"),
        ("model.w1.fc2", "model.w1.fc2"),
        ("", ""),
        ("a.1.2.3", "a.*.*.*"),
    ],
)
def test_collapse(name: str, wanted: str) -> None:
    assert collapse(name) == wanted


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("a.self_attn.q_proj", "a.self_attn.qkv_proj"),
        ("a.self_attn.v_proj", "a.self_attn.qkv_proj"),
        ("a.mlp.up_proj", "a.mlp.gate_up_proj"),
        ("a.experts.3.w1", "a.experts.3.w13"),
        ("a.experts.3.w3", "a.experts.3.w13"),
        ("a.experts.3.w2", None),
        ("a.mlp.down_proj", None),
        ("q_proj", None),
        ("a.gate_up_proj", None),
        ("a.xq_proj", None),
    ],
)
def test_packed_name(module: str, wanted: str | None) -> None:
    assert packed_name(module) == wanted


def test_fused_groups_hold_the_members_present_in_the_engines_order() -> None:
    modules = [
        "l.0.v_proj",
        "l.0.q_proj",
        "l.0.o_proj",
        "l.1.q_proj",
        "e.5.w3",
        "e.5.w2",
        "e.5.w1",
        "l.0.k_proj",
        "e.6.w3",
        "m.up_proj",
        "m.gate_proj",
    ]
    assert list(fused_groups(modules)) == [
        ("l.0.qkv_proj", ("l.0.q_proj", "l.0.k_proj", "l.0.v_proj")),
        ("e.5.w13", ("e.5.w1", "e.5.w3")),
        ("m.gate_up_proj", ("m.gate_proj", "m.up_proj")),
    ]
    assert list(fused_groups([])) == []
    assert all(
        packed_name(f"x.{leaf}") == f"x.{packed}"
        for packed, leaves in PACKED.items()
        for leaf in leaves
    )


@pytest.mark.parametrize(
    ("name", "module", "leaf", "plain"),
    [
        ("a.b.weight", "a.b", "weight", "a.b.weight"),
        ("a.b.bias", "a.b", "bias", "a.b.bias"),
        ("a.b.weight_scale", "a.b", "weight_scale", None),
        ("a.b.weight_scale_inv", "a.b", "weight_scale_inv", None),
        ("a.b.weight_scale_2", "a.b", "weight_scale_2", None),
        ("a.b.input_scale", "a.b", "input_scale", None),
        ("a.b.pre_quant_scale", "a.b", "pre_quant_scale", None),
        ("a.k_proj.k_scale", "a.k_proj", "k_scale", None),
        ("a.b.weight_packed", "a.b", "weight_packed", "a.b.weight"),
        ("a.e_score_correction_bias", "a.e_score_correction_bias", "", "a.e_score_correction_bias"),
        ("a.experts.gate_up_proj", "a.experts.gate_up_proj", "", "a.experts.gate_up_proj"),
        ("weight", "weight", "", "weight"),
        (".weight", ".weight", "", ".weight"),
        ("", "", "", ""),
        ("a.weight_scale_3", "a.weight_scale_3", "", "a.weight_scale_3"),
    ],
)
def test_split_and_canonical(name: str, module: str, leaf: str, plain: str | None) -> None:
    assert split(name) == (module, leaf)
    assert canonical(name) == plain


def test_gather_keeps_order_and_every_part() -> None:
    names = ["b.weight", "a.weight_scale", "a.weight", "b.bias", "a.bare", "a.input_scale"]
    modules = gather(map(_tensor, names))
    assert list(modules) == ["b", "a", "a.bare"]
    assert list(modules["a"].parts) == ["weight_scale", "weight", "input_scale"]
    assert sorted(t.name for m in modules.values() for t in m.parts.values()) == sorted(names)
    assert gather([]) == {}


# formats

NVFP4_PARTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "weight": ("U8", (4, 32)),
    "weight_scale": ("F8_E4M3", (4, 4)),
    "weight_scale_2": ("F32", ()),
}


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (NVFP4_PARTS | {"input_scale": ("F32", ())}, "nvfp4"),
        (NVFP4_PARTS, "w4a16_nvfp4"),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale": ("U8", (4, 2))}, "mxfp8"),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale_inv": ("U8", (4, 2))}, "mxfp8"),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale_inv": ("F8_E8M0", (4, 2))}, "mxfp8"),
        (
            {
                "weight": ("F8_E4M3", (4, 64)),
                "weight_scale": ("F32", ()),
                "input_scale": ("F32", ()),
            },
            "fp8",
        ),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale": ("F32", (1,))}, "fp8"),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale": ("F32", (4,))}, "fp8_per_channel"),
        ({"weight": ("F8_E4M3", (4, 64)), "weight_scale": ("F32", (4, 1))}, "fp8_per_channel"),
        ({"weight": ("F8_E4M3", (256, 384)), "weight_scale_inv": ("F32", (2, 3))}, "fp8_block"),
        ({"weight": ("F8_E4M3", (257, 384)), "weight_scale_inv": ("F32", (3, 3))}, "fp8_block"),
        ({"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", (2, 1, 3, 1))}, "fp8_block"),
        ({"weight": ("F8_E4M3", (256, 384)), "weight_scale_inv": ("F32", (2, 4))}, None),
        ({"weight": ("F8_E4M3", (4, 64))}, None),
        ({"weight": ("BF16", (4, 64)), "weight_scale": ("F32", ())}, None),
        ({"weight": ("U8", (2, 4, 32)), "weight_scale": ("F8_E4M3", (2, 4, 4))}, None),
        ({"weight": ("BF16", (4, 64))}, None),
        ({"weight_scale": ("F32", ())}, None),
        ({"bias": ("BF16", (4,))}, None),
    ],
)
def test_format_that_tensors_show(
    parts: dict[str, tuple[str, tuple[int, ...]]], shown: str | None
) -> None:
    found = _module(**parts).inferred_format
    assert (found.name if found else None) == shown


def test_module_properties() -> None:
    packed = _module(**NVFP4_PARTS)
    assert packed.dims == (4, 64)
    assert packed.quantized
    assert packed.scales == ("weight_scale", "weight_scale_2")
    assert packed.scale is packed.parts["weight_scale"]
    plain = _module(weight=("BF16", (4, 64)), bias=("BF16", (4,)))
    assert (plain.dims, plain.quantized, plain.scales, plain.scale) == ((4, 64), False, (), None)
    assert _module(bare=("BF16", (8,))).weight is not None
    assert _module(bare=("BF16", (8,))).dims is None
    assert _module(weight_packed=("U8", (4, 8)), weight_scale=("F8_E4M3", (4, 1))).dims == (4, 16)
    assert _module(weight=("BF16", (4, 64)), input_scale=("F32", ())).quantized
    assert _module(weight=("F8_E4M3", (4, 64))).quantized
    assert not _module(weight=("BF16", (4, 64)), k_scale=("F32", ())).quantized


@pytest.mark.parametrize(
    ("name", "leaf", "dtypes", "shapes"),
    [
        ("nvfp4", "weight_scale", ("F8_E4M3",), ((128, 20),)),
        ("nvfp4", "weight_scale_2", ("F32",), ((), (1,))),
        ("nvfp4", "input_scale", ("F32",), ((), (1,))),
        ("w4a16_nvfp4", "weight_scale", ("F8_E4M3",), ((128, 20),)),
        ("mxfp8", "weight_scale", ("U8", "F8_E8M0"), ((128, 10),)),
        ("mxfp8", "weight_scale_inv", ("U8", "F8_E8M0"), ((128, 10),)),
        ("fp8", "weight_scale", ("F32", "BF16", "F16"), ((), (1,))),
        ("fp8_per_channel", "weight_scale", ("F32", "BF16", "F16"), ((128,), (128, 1))),
        (
            "fp8_block",
            "weight_scale_inv",
            ("F32", "BF16", "F16", "F8_E8M0"),
            ((1, 3), (1, 1, 3, 1)),
        ),
    ],
)
def test_siblings_of_a_weight_of_128_by_320(
    name: str, leaf: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    sibling = FORMATS[name].sibling(leaf)
    assert sibling is not None
    assert sibling.dtypes == dtypes
    assert sibling.shapes(128, 320) == shapes


def test_formats_table() -> None:
    wanted = {
        "nvfp4": (True, 16),
        "w4a16_nvfp4": (True, 16),
        "mxfp8": (False, 32),
        "fp8": (False, None),
        "fp8_per_channel": (False, None),
        "fp8_block": (False, 128),
    }
    assert {n: (FORMATS[n].packed, FORMATS[n].group_size) for n in wanted} == wanted
    assert FORMATS["w4a16_nvfp4"].sibling("input_scale") is None
    assert FORMATS["mxfp8"].sibling("weight_scale_2") is None
    assert set(FORMAT_OF_ALGO.values()) <= set(FORMATS)
    assert {f.algo for f in FORMATS.values()} <= set(FORMAT_OF_ALGO)
    assert "MIXED_PRECISION" in KNOWN_ALGOS - set(FORMAT_OF_ALGO)


# exclusions

GATE = "model.layers.3.mlp.gate"


@pytest.mark.parametrize(
    ("pattern", "module", "strict", "loose"),
    [
        # exact
        (GATE, GATE, True, True),
        ("lm_head", "lm_head", True, True),
        ("model.layers.3.mlp", "model.layers.3.mlp.gate2", False, True),
        # glob
        ("*.mlp.gate", GATE, True, True),
        ("model.layers.*.mlp.gate", GATE, True, True),
        ("model.layers.?.mlp.gate", GATE, True, True),
        ("model.layers.[0-3].mlp.gate", GATE, True, True),
        ("model.layers.[0-2].mlp.gate", GATE, False, False),
        ("*gate", "model.layers.3.mlp.gate_proj", False, True),
        ("*self_attn*", "model.layers.0.self_attn.q_proj", True, True),
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True, True),
        ("*lm_head*", "lm_head", True, True),
        ("model.layers.0.self_attn*", "model.layers.10.self_attn.q_proj", False, False),
        ("*", "anything.at.all", True, True),
        # re:
        ("re:.*gate$", GATE, True, True),
        ("re:.*gate$", "model.layers.3.mlp.gate_proj", False, False),
        ("re:model\\.layers\\.\\d+\\.mlp\\.gate", GATE, True, True),
        ("re:.*lm_head", "lm_head", True, True),
        ("re:mlp", GATE, False, False),
        ("re:(", GATE, False, False),
        ("re:*x*", "x", False, False),
        ("re:", "", True, True),
        # part
        ("gate", GATE, False, True),
        ("mlp", GATE, False, True),
        ("ml?", GATE, False, True),
        ("gat", "model.layers.3.mlp.gate", False, True),
        ("lm_head", "language_model.lm_head", False, True),
        # substring
        ("layers.3", GATE, False, True),
        ("layers.3", "model.layers.30.mlp.up_proj", False, True),
        ("vision_tower", GATE, False, False),
        # dead
        ("model.layers.language_model.layers.0*", GATE, False, False),
        ("mtp*", GATE, False, False),
        ("GATE", GATE, False, False),
    ],
)
def test_exclusion_is_read_strictly_and_loosely(
    pattern: str, module: str, strict: bool, loose: bool
) -> None:
    found = Exclusions([pattern])
    assert found.strict(module) is strict
    assert found.loose(module) is loose
    assert found.pattern_for(module) == (pattern if loose else None)


def test_a_regular_expression_is_matched_on_the_whole_name() -> None:
    """compressed-tensors matches from the start; a pattern of a part of the end excludes nothing
    more than it names.
    """
    found = Exclusions(["re:model\\.layers\\.1"])
    assert found.strict("model.layers.1")
    assert not found.strict("other.model.layers.1")


def test_exclusions_are_read_together() -> None:
    found = Exclusions(["lm_head", "*.gate", "re:.*\\.visual\\..*", "embed"])
    for module in ("lm_head", "a.gate", "model.visual.x"):
        assert found.strict(module)
    assert not found.strict("model.embed_tokens")
    assert found.loose("model.embed_tokens")
    assert found.pattern_for("a.gate") == "*.gate"
    assert found.pattern_for("a.up_proj") is None
    assert Exclusions([]).loose("a") is False
    assert Exclusions([]).dead(["a"]) == []


@pytest.mark.parametrize("pattern", ["", "**", "*"])
def test_a_pattern_without_letters_does_not_exclude_by_substring(pattern: str) -> None:
    assert Exclusions([pattern]).loose("a.b") is ("*" in pattern)


def test_dead_patterns_are_those_that_match_under_no_reading() -> None:
    modules = ["lm_head", "model.embed_tokens", GATE, "model.layers.3.mlp.experts.0.w1"]
    alive = [
        "lm_head",
        "*embed*",
        "gate",
        "layers.3.mlp",
        "re:.*experts.*",
        "model.layers.?.mlp*",
        "expert?",
    ]
    dead = [
        "model.language_model.lm_head",
        "mtp*",
        "re:visual",
        "re:(",
        "layers.4",
        "*.router",
        "lm_heads",
    ]
    assert Exclusions([*alive, *dead]).dead(modules) == dead
    assert Exclusions(alive).dead([]) == alive


# declarations

NESTED = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "*.gate"],
    },
}
FLAT = {
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "group_size": 16}, "input_activations": None}
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "quant_method": "modelopt",
    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}
VENDOR = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "ignored_layers": ["lm_head", "vision_tower"],
}
DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


def _summary(d: Declaration) -> tuple[Any, ...]:
    return d.form, d.known, d.algo, d.group_size, d.exclude, d.kv, d.problems


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (NESTED, ("nested", True, "NVFP4", 16, ("lm_head", "*.gate"), "FP8", ())),
        (FLAT, ("flat", True, "NVFP4", 16, ("lm_head",), "FP8", ())),
        (VENDOR, ("vendor", True, "MXFP8", 32, ("lm_head", "vision_tower"), None, ())),
        ({"quant_method": "mxfp8"}, ("vendor", True, "MXFP8", 32, (), None, ())),
        (DEEPSEEK, ("vendor", True, "FP8_PB_WO", 128, (), None, ())),
        (
            {"quant_method": "fp8", "weight_block_size": [1, 32]},
            ("vendor", True, "MXFP8", 32, (), None, ()),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            ("vendor", True, "FP8", None, (), None, ()),
        ),
        (
            {
                "quant_method": "fp8",
                "modules_to_not_convert": ["lm_head"],
                "ignored_layers": ["lm_head", "a"],
            },
            ("vendor", True, "FP8", None, ("lm_head", "a"), None, ()),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": None},
            ("flat", True, None, None, (), None, ()),
        ),
        (
            {"quant_algo": "MXFP8", "kv_cache_quant_algo": None},
            ("flat", True, "MXFP8", None, (), None, ()),
        ),
        (
            {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "group_size": 16},
            ("flat", True, "NVFP4", 16, (), None, ()),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            ("gptq", True, "GPTQ", 128, (), None, ()),
        ),
        (
            {"quant_method": "compressed-tensors", "ignore": ["lm_head"]},
            ("foreign", False, None, None, ("lm_head",), None, ()),
        ),
        ({"quant_method": "hqq"}, ("foreign", False, None, None, (), None, ())),
        ({}, ("foreign", False, None, None, (), None, ())),
    ],
)
def test_dialects(raw: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert _summary(parse(raw, "config.json")) == wanted


@pytest.mark.parametrize("raw", [None, [], "NVFP4", 4, True])
def test_declaration_that_is_no_object(raw: Any) -> None:
    found = parse(raw, "config.json")
    assert not found.known
    assert found.problems == (f"is a {type(raw).__name__}, not an object",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_algo": 4}, "quant_algo"),
        ({"quant_algo": ["NVFP4"]}, "quant_algo"),
        ({"exclude_modules": "lm_head"}, "exclude_modules"),
        ({"exclude_modules": ["lm_head", 7]}, "exclude_modules"),
        ({"ignore": {"a": 1}}, "ignore"),
        ({"quantized_layers": ["a"]}, "quantized_layers"),
        ({"quantized_layers": {"a": "NVFP4"}}, "quantized_layers['a']"),
        ({"quantized_layers": {"a": {}}}, "quantized_layers['a']"),
        ({"quantized_layers": {"a": {"quant_algo": 4}}}, "quantized_layers['a']"),
        ({"quant_method": "mxfp8", "weight_block_size": 32}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": ["128", 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [True, 32]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": {"a": 1}}, "weight_block_size"),
    ],
)
def test_malformed_values_are_named(changes: dict[str, Any], words: str) -> None:
    found = parse({"quant_method": "modelopt", "quant_algo": "NVFP4", **changes}, "config.json")
    assert len(found.problems) == 1
    assert words in found.problems[0]


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**40,
    "x",
    [],
    [None],
    [[]],
    {},
    {"a": None},
    {"weights": 3},
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "key",
    [
        "quant_algo",
        "quant_method",
        "group_size",
        "ignore",
        "exclude_modules",
        "ignored_layers",
        "modules_to_not_convert",
        "quantized_layers",
        "config_groups",
        "kv_cache_scheme",
        "kv_cache_quant_algo",
        "weight_block_size",
        "quantization",
        "producer",
    ],
)
def test_odd_values_never_raise(key: str, nested: bool) -> None:
    for start in (NESTED["quantization"], FLAT, VENDOR, DEEPSEEK):
        assert isinstance(start, dict)
        for value in ODD:
            body = {**start, key: value}
            found = parse({"quantization": body} if nested else body, "x")
            assert found.algo is None or isinstance(found.algo, str)
            assert found.group_size is None or type(found.group_size) is int
            assert all(isinstance(p, str) for p in found.exclude)
            found.declared_for("model.layers.0.mlp.gate")


def test_group_size_must_be_a_whole_number() -> None:
    assert parse({"quant_algo": "NVFP4", "group_size": "16"}, "x").group_size is None
    assert parse({"quant_algo": "NVFP4", "group_size": True}, "x").group_size is None
    assert parse({"quant_algo": "NVFP4", "group_size": 32}, "x").group_size == 32


def _mixed(*names: str, algo: str = "NVFP4", exclude: Iterable[str] = ()) -> Declaration:
    layers = {n: {"quant_algo": algo, "group_size": 16} for n in names}
    return parse(
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": layers,
            "exclude_modules": list(exclude),
        },
        "x",
    )


def test_cover_in_a_uniform_declaration() -> None:
    found = parse(
        {"quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*.gate", "mlp"]}, "x"
    )
    inside = found.declared_for("a.mlp.up_proj")
    assert (inside.algo, inside.via, inside.group_size) == ("NVFP4", "uniform", 16)
    assert inside.format is FORMATS["nvfp4"]
    for name in ("lm_head", "a.gate"):
        assert (
            found.declared_for(name).algo,
            found.declared_for(name).via,
            found.declared_for(name).format,
        ) == (
            None,
            "excluded",
            None,
        )


def test_cover_in_a_mixed_declaration() -> None:
    found = _mixed(
        "l.0.mlp.experts.0.w1",
        "l.1.mlp.experts",
        "l.0.self_attn.qkv_proj",
        "l.2",
        exclude=["lm_head"],
    )
    assert found.mixed
    assert found.layers["l.2"] == Entry("NVFP4", 16)
    for module, via, entry in [
        ("l.0.mlp.experts.0.w1", "exact", ""),
        ("l.1.mlp.experts.5.w2", "container", "l.1.mlp.experts"),
        ("l.0.self_attn.k_proj", "packed", "l.0.self_attn.qkv_proj"),
        ("l.2.mlp.up_proj", "container", "l.2"),
    ]:
        cover = found.declared_for(module)
        assert (cover.algo, cover.via, cover.entry, cover.group_size) == (
            "NVFP4",
            via,
            entry,
            16,
        ), module
    for module in (
        "l.0.mlp.experts.0.w2",
        "l.0.self_attn.o_proj",
        "lm_head",
        "l.20.mlp.up_proj",
        "l",
    ):
        assert (found.declared_for(module).algo, found.declared_for(module).via) == (
            None,
            "unlisted",
        ), module


def test_an_exact_entry_goes_before_a_container() -> None:
    raw = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "NVFP4"}, "a.b": {"quant_algo": "FP8"}},
    }
    found = parse(raw, "x")
    assert (found.declared_for("a.b").algo, found.declared_for("a.b").via) == ("FP8", "exact")
    assert (found.declared_for("a.c").algo, found.declared_for("a.c").via) == ("NVFP4", "container")


def test_an_algorithm_that_is_not_known_has_no_format() -> None:
    declaration = parse({"quant_algo": "IQ2_XS"}, "x")
    assert declaration.declared_for("a").format is None
    assert declaration.unclear == ("quant_algo 'IQ2_XS' is not known",)
    assert (
        parse({"quant_algo": "FP8_BLOCK_SCALES"}, "x").declared_for("a").format
        is FORMATS["fp8_block"]
    )


def test_declarations_of_a_checkpoint_that_modelopt_wrote() -> None:
    found = read_declarations(open_checkpoint(MODELOPT / "qwen3moe_nvfp4_experts_max"))
    assert found.inline is not None
    assert found.file is not None
    assert found.effective is found.inline
    assert (found.inline.form, found.file.form) == ("flat", "nested")
    for d in (found.inline, found.file):
        assert (d.algo, d.group_size, d.kv, len(d.exclude), d.problems) == (
            "NVFP4",
            16,
            None,
            6,
            (),
        )
        assert d.declared_for("model.layers.1.self_attn.q_proj").via == "excluded"
        assert d.declared_for("model.layers.1.mlp.experts.7.up_proj").algo == "NVFP4"


def test_declaration_within_text_config_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"quantization_config": VENDOR}})
    )
    found = read_declarations(open_checkpoint(tmp_path))
    assert found.file is None
    assert found.effective is not None
    assert found.effective.algo == "MXFP8"


@pytest.fixture
def released_files(shared_data: Path) -> list[Path]:
    """Return the released configs; skipped where they are not here, a failure where they are
    required.
    """
    files = sorted((shared_data / "configs").glob("*.json"))
    assert len(files) >= 30
    return files


@pytest.fixture
def released(released_files: list[Path]) -> dict[str, Declaration]:
    """Return the declarations in the released configs by file name."""
    found = {}
    for file in released_files:
        raw = json.loads(file.read_bytes())
        body = _quantization(raw, file.name)
        if body is not None:
            config = raw if body is not raw else None
            found[file.name] = parse(body, file.name, config)
    return found


def _quantization(raw: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the quantization config of a file: nested, in the text model's config, or the file."""
    if name.endswith("hf_quant_config.json") or "quant_method" in raw:
        return raw
    nested = raw.get("quantization_config", raw.get("compression_config"))
    body = nested or (raw.get("text_config") or {}).get("quantization_config")
    return body if isinstance(body, dict) else None


NOT_UNDERSTOOD = {
    "unknown--Kimi-K2.5-Quark-W4A8_quantization.json",  # FP8 over INT4
}
WITHOUT = {
    "MiniMaxAI--MiniMax-M3_config.json",
    "nvidia--DeepSeek-V3.2-NVFP4_config.json",  # in hf_quant_config.json alone, like the next two
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8_config.json",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4_config.json",
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1_config.json",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16_config.json",
    "nvidia--Nemotron-H-56B-Base-8K_config.json",
}
"""Files that hold no quantization config."""


def test_every_released_config_is_parsed(
    released: dict[str, Declaration], released_files: list[Path]
) -> None:
    assert {f.name for f in released_files} - released.keys() == WITHOUT


def test_configs_of_released_checkpoints_parse(released: dict[str, Declaration]) -> None:
    """No crash, no problem, an algorithm that is known, and nothing that was not understood."""
    found = released
    for name, declaration in found.items():
        assert declaration.problems == (), (name, declaration.problems)
        if declaration.modelopt:
            assert declaration.algo in KNOWN_ALGOS, (name, declaration.algo)
        elif declaration.known and name not in NOT_UNDERSTOOD:
            assert declaration.understood, (name, declaration.unclear)
            assert all(s.format is not None for s in declaration.schemes()), name
        if declaration.mixed:
            assert declaration.layers, name
            assert all(
                declaration.declared_for(m).via == "exact" for m in list(declaration.layers)[:50]
            ), name
    m3 = found["nvidia--MiniMax-M3-NVFP4_hf_quant_config.json"]
    assert m3.mixed
    assert len(m3.layers) == 22_422
    assert {
        n: found[n].algo
        for n in found
        if n.startswith(("MiniMaxAI", "zai", "nvidia--Kimi-K2.7", "nvidia--GLM"))
    } == {
        "MiniMaxAI--MiniMax-M2.5_config.json": "FP8_PB_WO",
        "zai-org--GLM-5.1-FP8_config.json": "FP8_PB_WO",
        "nvidia--Kimi-K2.7-Code-NVFP4_config.json": "NVFP4",
        "nvidia--Kimi-K2.7-Code-NVFP4_hf_quant_config.json": "NVFP4",
        "nvidia--GLM-5.1-NVFP4_config.json": "NVFP4",
        "nvidia--GLM-5.1-NVFP4_hf_quant_config.json": "NVFP4",
    }


def test_released_configs_are_read_from_a_folder(
    released_files: list[Path], tmp_path: Path
) -> None:
    """Transformers reads every one of them; two hold ``Infinity``, as Python writes it
    (``time_step_limit``).
    """
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused = {}
    for file in released_files:
        target = tmp_path / (
            "hf_quant_config.json" if file.name.endswith("hf_quant_config.json") else "config.json"
        )
        target.write_bytes(file.read_bytes())
        problems = open_checkpoint(tmp_path).problems
        target.unlink()
        if problems:
            refused[file.name] = problems[0].message
    assert refused == {}


def test_both_files_of_a_release_name_one_algorithm(released: dict[str, Declaration]) -> None:
    """As published, config.json and hf_quant_config.json state the same ``quant_algo``, whatever
    dialect each is in.
    """
    found = released
    pairs = [
        (n, n.replace("_hf_quant_config", "_config"))
        for n in found
        if n.endswith("_hf_quant_config.json")
    ]
    differing = {
        a: (found[a].algo, found[b].algo)
        for a, b in pairs
        if b in found and found[a].algo != found[b].algo
    }
    assert sum(b in found for _, b in pairs) >= 8
    assert differing == {}


# families

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_local_experts": 2}
M3_CONFIG: dict[str, Any] = {
    "model_type": "minimax_m3_vl",
    "text_config": {"num_hidden_layers": 4, "num_local_experts": 2},
    "vision_config": {"num_hidden_layers": 1},
}


def _family(model_type: str) -> Family:
    found = load(model_type)
    assert found is not None
    return found


def _names_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the unquantized names and logical shapes of a checkpoint on disk."""
    found = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        plain = canonical(name)
        if plain is not None:
            wide = tensor.dtype == "U8" and len(tensor.shape) == 2
            found[plain] = (tensor.shape[0], tensor.shape[1] * 2) if wide else tensor.shape
    return found


@pytest.mark.parametrize(
    "name",
    [
        "vision_encoder.blocks.1.mlp.experts.0.fc1",
        "model.sam_model.blocks.0.attn.qkv",
        "model.qwen2_model.model.model.layers.0.mlp.up_proj",
        "code2wav.pre_transformer.layers.0.self_attn.q_proj",
    ],
)
def test_towers_that_are_called_otherwise(name: str) -> None:
    """Of Dots3-Note, DeepSeek-OCR2 and Qwen3-Omni: a recipe for the text model must leave them."""
    assert role(name) == "vision"


def test_families_are_found_by_model_type() -> None:
    assert len(known()) >= 15 and {
        "llama",
        "minimax_m3_vl",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
    } <= set(known())
    assert load("gpt2") is None
    assert load(None) is None
    assert family_of(None) is None
    assert family_of({"model_type": 7}) is None
    assert family_of(LLAMA) is load("llama")


@pytest.mark.parametrize(
    "name", ["src_llama", "llama_mxfp8", "src_qwen3moe", "qwen3moe_nvfp4_experts_max"]
)
def test_layout_equals_a_checkpoint_on_disk(name: str) -> None:
    """Transformers wrote the sources and ModelOpt the others; names and shapes are those of the
    family's layout.
    """
    config = json.loads((MODELOPT / name / "config.json").read_text())
    family = family_of(config)
    assert family is not None
    assert family.expected(config) == _names_of(MODELOPT / name)


def test_layout_equals_the_released_minimax_m3() -> None:
    """All 23,416 tensors of the BF16 release, by the table of the vendor's MXFP8 checkpoint."""
    spec = importlib.util.spec_from_file_location("sparse", TESTS / "sparse.py")
    assert spec is not None
    assert spec.loader is not None
    sparse = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sparse)
    config = sparse.m3_config()
    family = family_of(config)
    assert family is not None
    found, wanted = (
        family.expected(config),
        {name: shape for name, _, shape in sparse.bf16(sparse.rows())},
    )
    assert len(wanted) == 23_416
    assert sorted(found.keys() - wanted.keys())[:3] == []
    assert sorted(wanted.keys() - found.keys())[:3] == []
    assert {n: (found[n], s) for n, s in wanted.items() if found[n] != s} == {}


def test_layout_of_mixtral_is_the_hubs() -> None:
    """mistralai/Mixtral-8x7B-v0.1, whose index lists 995 tensors; sizes are transformers'
    defaults.
    """
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "tie_word_embeddings": False,
    }
    found = _family("mixtral").expected(config)
    layer = "model.layers.31."
    assert len(found) == 995
    assert {n.removeprefix(layer) for n in found if n.startswith(layer)} == {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "block_sparse_moe.gate.weight",
        *(f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(8) for w in ("w1", "w2", "w3")),
    }
    assert {n for n in found if ".layers." not in n} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert found[f"{layer}block_sparse_moe.experts.0.w2.weight"] == (4096, 14336)
    assert found[f"{layer}self_attn.k_proj.weight"] == (1024, 4096)


@pytest.mark.parametrize(
    ("changes", "dense", "sparse"),
    [
        ({}, [], [0, 1, 2, 3]),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, [0, 3], [1, 2]),
        ({"moe_layer_freq": [0, 0, 1, 1]}, [0, 1], [2, 3]),
        ({"moe_layer_freq": [0, 1]}, [], [0, 1, 2, 3]),
        ({"mlp_only_layers": [1, 3]}, [1, 3], [0, 2]),
        ({"mlp_only_layers": ["1"]}, [], [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [0, 2], [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2], [3]),
        ({"decoder_sparse_step": 0}, [], [0, 1, 2, 3]),
        ({"first_k_dense_replace": 3}, [0, 1, 2], [3]),
        ({"mlp_layer_types": ["dense"] * 4, "moe_layer_freq": [1] * 4}, [0, 1, 2, 3], []),
        ({"num_hidden_layers": 2, "moe_layer_freq": [0, 1, 1, 1]}, [0], [1]),
    ],
)
def test_kinds_of_layers(changes: dict[str, Any], dense: list[int], sparse: list[int]) -> None:
    config = QWEN | changes
    family = _family("qwen3_moe")
    assert family.layers(config, "dense") == dense
    assert family.layers(config, "sparse") == sparse
    assert family.layers(config, "all") == sorted(dense + sparse)
    found = family.expected(config)
    assert {
        i for i in range(4) if f"model.layers.{i}.mlp.experts.1.up_proj.weight" in found
    } == set(sparse)
    assert {i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" in found} == set(dense)


@pytest.mark.parametrize(
    ("changes", "indexer"),
    [
        ({}, []),
        ({"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}, [1, 3]),
        ({"sparse_attention_config": {"sparse_attention_freq": [0, 0, 0, 1]}}, [3]),
        ({"sparse_attention_config": {"sparse_attention_freq": [1]}}, []),
        ({"sparse_attention_config": [1] * 4}, []),
    ],
)
def test_layers_with_an_indexer(changes: dict[str, Any], indexer: list[int]) -> None:
    config = M3_CONFIG | {"text_config": {**M3_CONFIG["text_config"], **changes}}
    family = _family("minimax_m3_vl")
    assert family.layers(config, "indexer") == indexer
    name = "language_model.model.layers.{}.self_attn.index_q_proj.weight"
    assert [i for i in range(4) if name.format(i) in family.expected(config)] == indexer


@pytest.mark.parametrize("text", [None, [], "x", 3], ids=repr)
def test_a_text_config_that_is_no_object_is_no_crash(text: Any) -> None:
    family = _family("minimax_m3_vl")
    config = M3_CONFIG | {"text_config": text}
    try:
        family.expected(config)
    except ContentError:
        pass  # a sentence is as good as the defaults


def test_sizes_by_other_spellings_defaults_and_derivation() -> None:
    family = _family("qwen3_moe")
    assert family.experts({"num_experts": 6}) == 6
    assert family.experts({"num_local_experts": 5, "num_experts": 6}) == 5
    assert family.experts({}) == 128
    assert _family("llama").experts({}) is None
    llama = _family("llama")
    assert llama.value({"hidden_size": 64, "num_attention_heads": 4}, "head_dim") == 16
    assert (
        llama.value({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, "head_dim") == 32
    )
    assert llama.value({"hidden_size": "64"}, "hidden_size") == 4096
    assert llama.value({}, "no_such_key") is None
    assert llama.shape({}, ["no_such_key"]) is None
    assert llama.shape({"hidden_size": 64}, ["hidden_size*2", "3"]) == (128, 3)


def test_optional_parts_of_a_layout() -> None:
    llama = _family("llama")
    assert "lm_head.weight" in llama.expected(LLAMA)
    assert "lm_head.weight" not in llama.expected(LLAMA | {"tie_word_embeddings": True})
    assert "model.layers.1.self_attn.q_proj.bias" in llama.expected(
        LLAMA | {"attention_bias": True}
    )
    assert not any(n.endswith(".bias") for n in llama.expected(LLAMA))
    assert llama.optional("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not llama.optional("model.layers.0.mlp.up_proj.weight")
    assert _family("minimax_m3_vl").optional("mtp.layers.0.fc.weight")


def test_names_of_memory_are_told_from_the_hubs() -> None:
    family = _family("minimax_m3_vl")
    assert family.in_memory("model.language_model.layers.7.self_attn.q_proj.weight")
    assert family.in_memory("model.language_model.layers.7.mlp.experts.gate_up_proj")
    assert not any(map(family.in_memory, family.expected(M3_CONFIG)))
    assert not family.in_memory("xmodel.language_model.norm.weight")
    assert not family.in_memory("model.language_model.norm.weight.extra")
    assert not _family("llama").in_memory("model.norm.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10_001},
        {"num_local_experts": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 10_000, "num_local_experts": 10_000},
    ],
)
def test_absurd_config_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ContentError, match=r"config\.json declares"):
        _family("qwen3_moe").expected(QWEN | changes)


@pytest.mark.parametrize("count", [0, -5])
def test_a_model_without_layers_has_the_rest_only(count: int) -> None:
    found = _family("qwen3_moe").expected(QWEN | {"num_hidden_layers": count})
    assert set(found) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
