# SPDX-License-Identifier: Apache-2.0
"""State-dict adapters: names, what is quantized, values, refusals, memory, shards on four simulated
ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import exporter
from exporter import adapters
from exporter.adapters import (
    MINIMAX_M3,
    QWEN3_MOE,
    TABLES,
    NativePrefix,
    NativeStack,
    StateDictAdapter,
    create_mxfp8_scale_inv,
    dequantize_mxfp8,
)
from tests import adapting, sparse
from tests.adapting import GOLDEN, QWEN, State, codes, same, values
from tests.paths import ROOT
from verifier.errors import EncodeError, PlanError
from verifier.layouts import family as families

L1 = "language_model.model.layers.1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def mxfp8() -> State:
    return adapting.with_mtp(adapting.read(GOLDEN / "mxfp8"))


@pytest.fixture(scope="module")
def m3() -> StateDictAdapter:
    return StateDictAdapter(adapting.mtp_config())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, mxfp8: State) -> State:
    """Return the MXFP8 golden in native names, made without the adapter."""
    return adapting.native_of(
        adapting.write(tmp_path_factory.mktemp("m3") / "m3", adapting.mtp_config(), mxfp8)
    )


def alike(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)


# --- names and what is quantized


def released_config() -> dict[str, Any]:
    config = sparse.m3_config()
    config["quantization_config"] = sparse.vendor_quantization()
    return config


@pytest.fixture(scope="module")
def released() -> StateDictAdapter:
    return StateDictAdapter(released_config())


def test_the_quantized_keys_are_those_of_the_release(released: StateDictAdapter) -> None:
    rows = sparse.rows()
    scales = {n.removesuffix("_scale_inv") for n, _, _ in rows if n.endswith("_scale_inv")}
    assert len(scales) == 22_422
    assert sum("index_" in n for n in scales) == 114
    assert set(released.quantized) == scales


def test_every_tensor_of_the_release_has_its_published_native_name(
    released: StateDictAdapter,
) -> None:
    experts = {"w1": "gate_and_up_projs", "w3": "gate_and_up_projs", "w2": "down_projs"}
    for name, _, _ in sparse.rows():
        if name.endswith("_scale_inv"):
            continue
        found = re.fullmatch(
            r"language_model\.(.+)\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight", name
        )
        expected = (
            f"{found[1]}.mlp.experts.{experts[found[2]]}" if found else adapting.native_name(name)
        )
        assert released.native_name(name) == expected


def test_a_load_of_the_release_asks_for_its_45838_tensors(released: StateDictAdapter) -> None:
    rows = {n: (d, s) for n, d, s in sparse.rows()}
    native: State = {}
    for name, (dtype, shape) in rows.items():
        if ".experts." not in name and not name.endswith("_scale_inv"):
            kept = torch.float32 if dtype == "F32" else torch.bfloat16
            native[released.native_name(name)] = torch.empty(shape, dtype=kept, device="meta")
    for i in range(3, 60):
        for leaf, shape in (
            ("gate_and_up_projs", (128, 6144, 6144)),
            ("down_projs", (128, 3072, 6144)),
        ):
            native[f"model.layers.{i}.mlp.experts.{leaf}"] = torch.empty(
                shape, dtype=torch.bfloat16, device="meta"
            )
    dtypes = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.uint8: "U8",
    }
    asked = {
        n: (dtypes[t.dtype], tuple(t.shape))
        for n, t in released.to_hf(native, quantization=True).items()
    }
    assert len(asked) == 45_838
    assert asked == rows


@pytest.mark.parametrize(
    ("hub", "expected"),
    [
        (
            "language_model.model.layers.4.block_sparse_moe.gate.weight",
            "model.layers.4.mlp.gate.weight",
        ),
        (
            "language_model.model.layers.4.block_sparse_moe.e_score_correction_bias",
            "model.layers.4.mlp.gate.e_score_correction_bias",
        ),
        (
            "language_model.model.layers.4.block_sparse_moe.shared_experts.up_proj.weight",
            "model.layers.4.shared_experts.up_proj.weight",
        ),
        (
            "language_model.model.layers.4.self_attn.index_k_norm.weight",
            "model.layers.4.self_attn.indexer.index_k_norm.weight",
        ),
        (
            "language_model.model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
        ),
        ("language_model.lm_head.weight", "lm_head.weight"),
        (
            "vision_tower.vision_model.pre_layrnorm.bias",
            "vision_tower.vision_model.pre_layrnorm.bias",
        ),
        ("multi_modal_projector.linear_1.bias", "vision_tower.multi_modal_projector.linear_1.bias"),
        ("patch_merge_mlp.linear_2.weight", "vision_tower.patch_merge_mlp.linear_2.weight"),
    ],
)
def test_native_names(released: StateDictAdapter, hub: str, expected: str) -> None:
    assert released.native_name(hub) == expected


@pytest.mark.parametrize("head", ["mtp.", "language_model.mtp.", "language_model.model.mtp."])
def test_mtp_names_at_every_depth(m3: StateDictAdapter, head: str) -> None:
    name = f"{head}layers.0.transformer_layer.block_sparse_moe.experts.3.w3.weight"
    assert (
        m3.native_name(name) == "model.mtp.layers.0.transformer_layer.mlp.experts.gate_and_up_projs"
    )
    assert m3.native_name(f"{head}layers.0.eh_proj.weight") == "model.mtp.layers.0.eh_proj.weight"


def test_the_family_data_say_what_there_is(released: StateDictAdapter) -> None:
    for name in (
        "language_model.model.layers.60.input_layernorm.weight",
        "language_model.model.layers.0.mlp.gate_proj.bias",
        "language_model.model.layers.0.block_sparse_moe.gate.weight",
    ):
        with pytest.raises(PlanError, match=re.escape(name)):
            released.native_name(name)


def test_the_released_mix_is_refused_by_name_where_it_is_no_mxfp8() -> None:
    tensors = sparse.mixed(sparse.rows())
    adapter = StateDictAdapter(
        sparse.m3_config() | {"quantization_config": sparse.release_quantization(tensors)}
    )
    assert set(adapter.quantized) == {
        n for n, d, _ in tensors if d == "F8_E4M3" and n.endswith(".weight")
    }
    stack = torch.empty(128, 3072, 6144, device="meta", dtype=torch.bfloat16)
    with pytest.raises(
        PlanError, match=r"layers\.3\.block_sparse_moe\.experts\.0\.w2\.weight: declared NVFP4"
    ):
        adapter.to_hf({"model.layers.3.mlp.experts.down_projs": stack}, quantization=True)


# --- round trips


def test_a_bf16_checkpoint_goes_there_and_back_bit_for_bit() -> None:
    source = adapting.read(GOLDEN / "bf16")
    adapter = StateDictAdapter(adapting.config_of(GOLDEN / "bf16"))
    given = dict(source)
    made = adapter.from_hf(given)
    assert given == {}
    assert made["model.layers.2.mlp.experts.gate_and_up_projs"].shape == (8, 128, 256)
    assert {"model.layers.1.mlp.gate.weight", "lm_head.weight"} < made.keys()
    assert alike(adapter.to_hf(made), source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_mxfp8_checkpoint_is_decoded_to_the_dtype(
    mxfp8: State, native: State, dtype: torch.dtype
) -> None:
    made = StateDictAdapter(adapting.mtp_config(), dtype=dtype).from_hf(dict(mxfp8))
    assert made.keys() == native.keys()
    name = f"{L1}.self_attn.index_q_proj.weight"
    index = made["model.layers.1.self_attn.indexer.index_q_proj.weight"]
    assert same(index, values(mxfp8[name], mxfp8[f"{name}_scale_inv"], dtype))
    stack = made["model.layers.1.mlp.experts.gate_and_up_projs"]
    assert stack.dtype == dtype
    for e in range(8):
        parts = [f"{L1}.block_sparse_moe.experts.{e}.{w}.weight" for w in ("w1", "w3")]
        both = [values(mxfp8[p], mxfp8[f"{p}_scale_inv"], dtype).t() for p in parts]
        assert same(stack[e], torch.cat(both, 1))
    assert made["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert made["model.norm.weight"].dtype == torch.bfloat16


def test_a_decoded_checkpoint_goes_back_under_hub_names(
    mxfp8: State, m3: StateDictAdapter, native: State
) -> None:
    made = m3.from_hf(dict(mxfp8))
    assert alike(made, native)
    assert alike(m3.to_hf(made), adapting.plain(mxfp8))
    assert alike(m3.from_hf(m3.to_hf(made)), made)


def test_a_load_asks_for_what_is_on_disk(mxfp8: State, m3: StateDictAdapter, native: State) -> None:
    asked = m3.to_hf(native, quantization=True)
    assert {n: (t.shape, t.dtype) for n, t in asked.items()} == {
        n: (t.shape, t.dtype) for n, t in mxfp8.items()
    }
    for name, tensor in asked.items():
        if name.endswith("_scale_inv"):
            assert bool((tensor == 127).all())
            assert type(tensor) is torch.Tensor
    code = asked[f"{L1}.self_attn.q_proj.weight"]
    assert same(
        code,
        native["model.layers.1.self_attn.q_proj.weight"].clamp(-448, 448).to(torch.float8_e4m3fn),
    )
    assert code.is_contiguous()
    large = torch.full((128, 256), 1e6)
    one = m3.convert_single_tensor_to_hf(
        "model.mtp.layers.0.eh_proj.weight", large, quantization=True
    )
    assert [n for n, _ in one] == [
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.eh_proj.weight_scale_inv",
    ]
    assert bool((one[0][1].float() == 448).all())


def test_the_text_model_alone(mxfp8: State, native: State) -> None:
    config = adapting.mtp_config()
    text = config["text_config"] | {
        "model_type": "minimax_m3_vl_text",
        "quantization_config": config["quantization_config"],
    }
    beside = ("vision", "multi", "patch")
    given = {
        n.removeprefix("language_model."): t for n, t in mxfp8.items() if not n.startswith(beside)
    }
    adapter = StateDictAdapter(text)
    assert set(adapter.quantized) >= {n for n, t in given.items() if t.dtype == torch.float8_e4m3fn}
    made = adapter.from_hf(dict(given))
    assert alike(made, {n: t for n, t in native.items() if not n.startswith("vision_tower")})
    assert adapter.to_hf(made, quantization=True).keys() == given.keys()
    with pytest.raises(PlanError, match=r"vision_tower\.x"):
        adapter.native_name("vision_tower.x")


def test_the_spelling_and_the_scales_on_disk_win_over_the_config(mxfp8: State) -> None:
    config = adapting.mtp_config()
    del config["quantization_config"]
    names = {
        n.replace("mtp.", "language_model.model.mtp.", 1) if n.startswith("mtp.") else n
        for n in mxfp8
    }
    names.remove(f"{L1}.self_attn.q_proj.weight_scale_inv")
    adapter = StateDictAdapter(config, names=names)
    assert set(adapter.quantized) == {
        n.removesuffix("_scale_inv") for n in names if n.endswith("_scale_inv")
    }
    weight = torch.zeros(128, 256)
    found = adapter.convert_single_tensor_to_hf(
        "model.mtp.layers.0.eh_proj.weight", weight, quantization=True
    )
    head = "language_model.model.mtp.layers.0.eh_proj.weight"
    assert [n for n, _ in found] == [head, f"{head}_scale_inv"]


@pytest.mark.parametrize(
    "pattern", ["layers.1.self_attn", "language_model.*.1.self_attn*", "re:.*layers.1.self_attn"]
)
def test_what_the_declaration_excludes_is_not_quantized(m3: StateDictAdapter, pattern: str) -> None:
    config = adapting.mtp_config()
    config["quantization_config"]["ignored_layers"] += [pattern, "mlp.gate", "layers.2.self_att"]
    left = set(m3.quantized) - set(StateDictAdapter(config).quantized)
    assert left == {
        f"{L1}.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "o", "index_q", "index_k")
    }


# --- a further family is a further table


def test_a_second_family_needs_no_second_adapter(vendor: Any) -> None:
    config, source = adapting.config_of(vendor.path), adapting.read(vendor.path)
    adapter = StateDictAdapter(config)
    assert set(adapter.quantized) == {
        n for n, t in source.items() if t.dtype == torch.float8_e4m3fn
    }
    made = adapter.from_hf(dict(source))
    assert alike(made, adapting.native_of(vendor.path))
    assert alike(adapter.to_hf(made), adapting.plain(source))
    asked = adapter.to_hf(made, quantization=True)
    assert {n: (t.shape, t.dtype) for n, t in asked.items()} == {
        n: (t.shape, t.dtype) for n, t in source.items()
    }


def test_a_table_may_stack_without_transposing_and_name_as_it_likes() -> None:
    stacks = (
        NativeStack("moe.up", ("mlp.experts.{expert}.up_proj.weight",), transpose=False),
        NativeStack(
            "moe.gate_down",
            tuple(f"mlp.experts.{{expert}}.{p}_proj.weight" for p in ("gate",)),
            transpose=True,
        ),
        NativeStack("moe.down", ("mlp.experts.{expert}.down_proj.weight",), transpose=False),
    )
    table = dataclasses.replace(QWEN3_MOE, stacks=stacks, inside={"self_attn.": "attention."})
    source = adapting.read(QWEN)
    adapter = StateDictAdapter(adapting.config_of(QWEN), table)
    made = adapter.from_hf(dict(source))
    head = "model.layers.0.mlp.experts"
    assert same(
        made["model.layers.0.moe.up"],
        torch.stack([source[f"{head}.{e}.up_proj.weight"] for e in range(8)]),
    )
    assert "model.layers.1.attention.o_proj.weight" in made
    assert alike(adapter.to_hf(made), source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inside": {"mlp.gate.": "router.", "mlp.ga": "x."}},
            r"mlp\.gate\.weight: two rules .* match it, .mlp\.gate\.. and .mlp\.ga",
        ),
        (
            {"inside": {"mlp.experts.0.": "first."}},
            r"^model\.layers\.0\.mlp\.experts\.0\.\w+\.weight: two rules .* match it",
        ),
        (
            {"places": (*QWEN3_MOE.places, NativePrefix(("lm_",), "x."))},
            r"lm_head\.weight: two rules .* match it, .lm_head\.. and .lm_.",
        ),
        (
            {"places": QWEN3_MOE.places[:-1]},
            r"lm_head\.weight: no rule of the table for qwen3_moe matches it",
        ),
        (
            {"inside": {"self_attn.q_proj.": "self_attn.k_proj."}},
            r"self_attn\.[qk]_proj\.weight and .*[qk]_proj\.weight would both be "
            r"model\.layers\.0\.self_attn\.k_proj",
        ),
        ({"family": "no_such"}, r"no layout of the family no_such"),
    ],
)
def test_a_table_that_is_not_one_to_one_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        StateDictAdapter(adapting.config_of(QWEN), dataclasses.replace(QWEN3_MOE, **change))


def test_a_model_type_without_a_table_is_named() -> None:
    with pytest.raises(
        PlanError,
        match=r"no table of native names for model_type gpt2 \(known: minimax_m3, .*pass table=",
    ):
        StateDictAdapter({"model_type": "gpt2"})


@pytest.mark.parametrize("model_type", sorted(TABLES))
def test_every_table_names_every_tensor_of_its_family(model_type: str) -> None:
    table = TABLES[model_type]
    small = {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
    }
    nested = model_type == "minimax_m3_vl"
    config = {"model_type": model_type} | ({"text_config": small} if nested else small)
    family = families.load(table.family)
    assert family is not None
    adapter = StateDictAdapter(config)
    names = family.expected({table.nest: config} if table.nest else config)
    assert len(names) > 20
    for name in names:
        if name.startswith(table.strip):
            assert adapter.native_name(name.removeprefix(table.strip))


# --- refusals


Change = Callable[[State], object]


def bad(name: str, tensor: torch.Tensor) -> Change:
    return lambda s: s.__setitem__(name, tensor)


Q = f"{L1}.self_attn.q_proj"
MTP = "mtp.layers.0."


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s.pop(f"{Q}.weight_scale_inv"),
            PlanError,
            rf"{Q}\.weight: .*e4m3fn without a scale; {Q}\.weight_scale_inv",
        ),
        (
            lambda s: s.pop(f"{MTP}eh_proj.weight_scale_inv"),
            PlanError,
            r"mtp\.layers\.0\.eh_proj\.weight: .* without a scale",
        ),
        (
            lambda s: s.pop(f"{Q}.weight"),
            PlanError,
            rf"{Q}\.weight_scale_inv: a scale, and {Q}\.weight is not",
        ),
        (
            bad(f"{Q}.weight_scale", torch.zeros(128, 4, dtype=torch.uint8)),
            PlanError,
            rf"{Q}\.weight: two scales",
        ),
        (
            bad(f"{Q}.weight", torch.zeros(128, 128)),
            PlanError,
            rf"{Q}\.weight_scale_inv: a scale of a torch\.float32 weight",
        ),
        (
            bad(f"{Q}.weight_scale_inv", torch.zeros(4, 128, dtype=torch.uint8)),
            EncodeError,
            rf"{Q}\.weight: mxfp8: .*\[4, 128\]",
        ),
        (
            bad(f"{Q}.weight_scale_inv", torch.zeros(128, 4)),
            EncodeError,
            rf"{Q}\.weight: mxfp8: .*scale of torch\.float32",
        ),
        (
            bad(f"{Q}.weight_scale_2", torch.zeros(())),
            PlanError,
            rf"{Q}\.weight_scale_2: not a tensor of MXFP8",
        ),
        (
            bad(f"{Q}.bias", torch.zeros(128)),
            PlanError,
            rf"{Q}\.bias: the family has no such tensor",
        ),
        (
            bad("mtp.layers.1.enorm.weight", torch.zeros(128)),
            PlanError,
            r"mtp\.layers\.1\.enorm\.weight: .* declares 1 MTP module",
        ),
        (
            bad("language_model.mtp.layers.0.enorm.weight", torch.zeros(128)),
            PlanError,
            r"language_model\.mtp\.layers\.0\.enorm\.weight and mtp\.layers\.0\.enorm\.weight "
            r"are two names of one",
        ),
        (
            lambda s: [
                s.pop(f"{L1}.block_sparse_moe.experts.5.w3.{x}")
                for x in ("weight", "weight_scale_inv")
            ],
            PlanError,
            r"model\.layers\.1\.mlp\.experts\.gate_and_up_projs: 1 of its 16 parts "
            r".*experts\.5\.w3\.weight; .*device_mesh=",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_taken(
    mxfp8: State, m3: StateDictAdapter, change: Change, error: type[Exception], message: str
) -> None:
    given = dict(mxfp8)
    change(given)
    before = dict(given)
    with pytest.raises(error, match=message):
        m3.from_hf(given)
    assert given.keys() == before.keys()
    assert all(given[n] is before[n] for n in given)


def test_an_mtp_module_that_the_config_does_not_declare_is_refused_or_left_out(
    mxfp8: State, native: State
) -> None:
    adapter = StateDictAdapter(adapting.config_of(GOLDEN / "mxfp8"))
    with pytest.raises(PlanError, match=r"mtp\.layers\.0\..*declares 0 MTP modules"):
        adapter.from_hf(dict(mxfp8))
    given = dict(mxfp8)
    made = adapter.from_hf(given, exclude_key_regex=r"mtp\.")
    assert given == {}
    assert alike(made, {n: t for n, t in native.items() if ".mtp." not in n})


def test_parts_of_a_stack_that_differ_are_refused(mxfp8: State, m3: StateDictAdapter) -> None:
    name = f"{L1}.block_sparse_moe.experts.3.w3.weight"
    given = dict(mxfp8) | {name: torch.zeros(64, 128, dtype=torch.bfloat16)}
    del given[f"{name}_scale_inv"]
    with pytest.raises(
        EncodeError,
        match=rf"{name}: shape \[64, 128\], but .*experts\.0\.w1\.weight of the same stack has "
        r"\[128, 128\]",
    ):
        m3.from_hf(given)
    given = dict(mxfp8) | {name: torch.zeros(128, 128)}
    del given[f"{name}_scale_inv"]
    with pytest.raises(
        EncodeError, match=rf"{name}: dtype torch\.float32, but .* has torch\.bfloat16"
    ):
        m3.from_hf(given)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "model.layers.1.mlp.experts.down_projs",
            torch.zeros(7, 128, 128),
            r"down_projs: shape \[7, 128, 128\]; expected 3 dimensions, the first 8 experts",
        ),
        (
            "model.layers.1.mlp.experts.gate_and_up_projs",
            torch.zeros(8, 128, 255),
            r"dimension 2 does not split into 2",
        ),
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight",
            torch.zeros(1),
            r"the family has no such native tensor",
        ),
        (
            "model.layers.1._extra_state",
            torch.zeros(1),
            r"_extra_state: the family has no such native tensor .*exclude_key_regex",
        ),
    ],
)
def test_native_tensors_that_do_not_fit(
    m3: StateDictAdapter, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        m3.to_hf({name: tensor})


def test_what_is_excluded_does_not_come_out(m3: StateDictAdapter, native: State) -> None:
    extra = native | {"model.layers.1._extra_state": torch.zeros(1)}
    found = m3.to_hf(
        extra, exclude_key_regex=r".*_extra_state|mtp\.|language_model\.lm_head", quantization=True
    )
    assert not any(n.startswith("mtp.") or "lm_head" in n or "extra" in n for n in found)
    assert f"{Q}.weight_scale_inv" in found
    with pytest.raises(PlanError, match="is not a regular expression"):
        m3.to_hf(native, exclude_key_regex="(")


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (None, "declares no quantized weight"),
        ({"quant_method": "gptq"}, "quantization_config is gptq, not MXFP8"),
    ],
)
def test_a_quantized_load_of_what_is_not_mxfp8_is_refused(
    declaration: object, message: str
) -> None:
    config = adapting.config_of(GOLDEN / "bf16") | (
        {"quantization_config": declaration} if declaration else {}
    )
    with pytest.raises(PlanError, match=message):
        StateDictAdapter(config).to_hf({"model.norm.weight": torch.zeros(128)}, quantization=True)


def test_nvfp4_is_refused_by_name(mixed: Any) -> None:
    adapter = StateDictAdapter(adapting.config_of(mixed.path))
    with pytest.raises(
        PlanError,
        match=r"experts\.\d\.\w+\.(weight_scale_2|input_scale): not a tensor of MXFP8"
        r"|declared NVFP4",
    ):
        adapter.from_hf(adapting.read(mixed.path))


# --- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 48, 96, 100])
def test_ragged_widths_are_decoded(width: int, dtype: torch.dtype) -> None:
    code, scale = codes(5, width, seed=width)
    assert same(dequantize_mxfp8(code, scale, dtype=dtype), values(code, scale, dtype))
    found = dequantize_mxfp8(code.view(torch.uint8), scale.view(torch.float8_e8m0fnu), dtype=dtype)
    assert same(found, values(code, scale, dtype))
    made = create_mxfp8_scale_inv(code)
    assert (made.shape, made.dtype) == (scale.shape, torch.uint8)
    assert same(dequantize_mxfp8(code, made, dtype=dtype), code.to(dtype))


def test_values_that_no_weight_has_are_refused(mxfp8: State, m3: StateDictAdapter) -> None:
    code, scale = codes(4, 64, seed=1)
    scale[2, 1] = 255
    with pytest.raises(EncodeError, match="NaN or infinity"):
        dequantize_mxfp8(code, scale)
    nan = code.view(torch.uint8).clone()
    nan[0, 0] = 0x7F
    with pytest.raises(EncodeError, match="NaN or infinity"):
        dequantize_mxfp8(nan, torch.full_like(scale, 120))
    large = torch.full((1, 32), 448.0).to(torch.float8_e4m3fn)
    assert bool(
        (
            dequantize_mxfp8(large, torch.tensor([[140]], dtype=torch.uint8)).float() == 448 * 2**13
        ).all()
    )
    with pytest.raises(EncodeError, match=r"infinity in torch\.float16"):
        dequantize_mxfp8(large, torch.tensor([[140]], dtype=torch.uint8), dtype=torch.float16)
    with pytest.raises(EncodeError, match=r"dtype is torch\.int8"):
        dequantize_mxfp8(large, torch.tensor([[140]], dtype=torch.uint8), dtype=torch.int8)
    broken = dict(mxfp8)
    broken[f"{Q}.weight_scale_inv"] = torch.full_like(mxfp8[f"{Q}.weight_scale_inv"], 255)
    with pytest.raises(EncodeError, match=rf"{Q}\.weight: mxfp8: the decoded values hold NaN"):
        m3.from_hf(broken)


def test_a_placeholder_has_the_global_shape_and_lies_where_the_weight_does() -> None:
    found = create_mxfp8_scale_inv(torch.empty(6, 70, device="meta"))
    assert (tuple(found.shape), found.dtype, found.device.type) == ((6, 3), torch.uint8, "meta")
    with pytest.raises(EncodeError, match=r"shape \[6\]"):
        create_mxfp8_scale_inv(torch.empty(6))


# --- shards: four simulated ranks, each with the local part that torch's own rule gives it


@pytest.fixture(params=range(4))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(8, 256), (5, 96), (3, 100), (7, 33), (2, 40), (1, 8)])
def test_a_shard_is_decoded_against_its_slice_of_the_global_scale(
    rank: int, shape: tuple[int, int]
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    code, scale = codes(*shape, seed=shape[1])
    whole = values(code, scale, torch.float32)
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts: list[tuple[Any, list[Placement]]] = [
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
    ]
    layouts += [
        (grid, list(p)) for p in itertools.product([Shard(0), Shard(1), Replicate()], repeat=2)
    ]
    for mesh, placements in layouts:
        sharded = adapting.shard(code.view(torch.uint8), mesh, placements)
        part = sharded.to_local().view(torch.float8_e4m3fn)
        sharded = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=code.shape, stride=(shape[1], 1)
        )
        found = dequantize_mxfp8(sharded, scale, dtype=torch.float32)
        assert isinstance(found, DTensor)
        assert (found.shape, found.placements) == (code.shape, tuple(placements))
        assert same(found.to_local(), adapting.shard(whole, mesh, placements).to_local()), (
            mesh,
            placements,
        )
        assert create_mxfp8_scale_inv(sharded).shape == scale.shape
        assert type(create_mxfp8_scale_inv(sharded)) is torch.Tensor


def test_a_scale_that_is_a_shard_itself_must_reach(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    code, scale = codes(8, 64, seed=2)
    mesh = init_device_mesh("cpu", (4,))
    weight = adapting.shard(code.view(torch.uint8), mesh, [Shard(0)])
    found = dequantize_mxfp8(weight, adapting.shard(scale, mesh, [Shard(0)]), dtype=torch.float32)
    assert same(found.to_local(), values(code, scale, torch.float32)[2 * rank : 2 * rank + 2])
    with pytest.raises(EncodeError, match="load the whole scale"):
        dequantize_mxfp8(weight, adapting.shard(scale, mesh, [Shard(1)]))


def test_a_stack_sharded_where_its_pieces_are_joined_is_refused(
    rank: int, native: State, m3: StateDictAdapter
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh, name = init_device_mesh("cpu", (4,)), "model.layers.1.mlp.experts.gate_and_up_projs"
    with pytest.raises(
        PlanError, match=rf"{name}: sharded along the output dimension, which joins 2 projections"
    ):
        m3.to_hf({name: adapting.shard(native[name], mesh, [Shard(2)])})
    down = name.replace("gate_and_up", "down")
    parts = m3.to_hf({down: adapting.shard(native[down], mesh, [Shard(2)])})
    assert same(m3.from_hf(parts)[down].to_local(), native[down][:, :, 32 * rank : 32 * rank + 32])


def test_experts_are_spread_over_ranks_and_a_mesh(
    rank: int, native: State, mxfp8: State, m3: StateDictAdapter
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    name = "model.layers.1.mlp.experts.gate_and_up_projs"
    stack = adapting.shard(native[name], grid, [Shard(1), Shard(0)])
    parts = m3.to_hf({name: stack})
    mine = range(4 * (rank % 2), 4 * (rank % 2) + 4)
    assert {int(n.split(".")[6]) for n in parts} == set(mine)
    back = m3.from_hf(parts, grid)[name]
    assert (back.shape, back.placements) == (stack.shape, stack.placements)
    assert same(back.to_local(), stack.to_local())
    # A whole checkpoint on every rank: the others' experts are dropped.
    given = dict(mxfp8)
    made = m3.from_hf(given, grid["ep"])[name]
    assert given == {}
    assert made.placements == (Shard(0),)
    assert same(made.to_local(), native[name][mine.start : mine.stop])
    with pytest.raises(PlanError, match="without one named ep"):
        m3.from_hf(dict(mxfp8), init_device_mesh("cpu", (2, 2)))


def test_experts_that_ranks_do_not_divide(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    adapter, mesh = (
        StateDictAdapter(adapting.ragged()[0] | {"num_local_experts": 5}),
        init_device_mesh("cpu", (4,)),
    )
    name = "model.layers.0.mlp.experts.gate_and_up_projs"
    stack = torch.randn(5, 80, 96)
    parts = adapter.to_hf({name: adapting.shard(stack, mesh, [Shard(0)])})
    assert len(parts) == 2 * [2, 2, 1, 0][rank]
    if rank == 3:
        with pytest.raises(PlanError, match="5 experts over 4 ranks leave none for rank 3"):
            adapter.from_hf(parts, mesh)
        return
    made = adapter.from_hf(parts, mesh)[name]
    assert (made.shape, made.placements) == (stack.shape, (Shard(0),))
    assert same(made.to_local(), stack[2 * rank : 2 * rank + 2])


# --- memory


class Live(TorchDispatchMode):
    """The most bytes that tensors' memory took at any operation: what was given, and what each
    operation returns.
    """

    def __init__(self, given: State) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in given.values():
            self._add(tensor)
        self.start = self._now()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def _now(self) -> int:
        self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
        return sum(nbytes for _, nbytes in self.known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self._now())
        return result


@pytest.mark.parametrize("which", ["bf16", "mxfp8"])
def test_from_hf_takes_the_larger_of_input_and_result_and_one_layer(which: str) -> None:
    adapter = StateDictAdapter(adapting.config_of(GOLDEN / which))
    given = {n: t.clone() for n, t in adapting.read(GOLDEN / which).items()}
    live = Live(given)
    with live:
        made = adapter.from_hf(given)
    result = sum(t.nbytes for t in made.values())
    layer = sum(t.nbytes for n, t in made.items() if n.startswith("model.layers.2."))
    limit = max(live.start, result) + layer
    assert limit < 0.75 * (live.start + result)  # keeping the input would be seen
    assert result < live.peak <= limit


def test_keeping_the_input_would_be_seen() -> None:
    adapter = StateDictAdapter(adapting.config_of(GOLDEN / "bf16"))
    given = {n: t.clone() for n, t in adapting.read(GOLDEN / "bf16").items()}
    live = Live(given)
    kept = dict(given)
    with live:
        made = adapter.from_hf(given)
    layer = sum(t.nbytes for n, t in made.items() if n.startswith("model.layers.2."))
    assert live.peak > live.start + layer
    assert kept


def test_views_of_a_native_stack_give_it_back_uncopied(native: State, m3: StateDictAdapter) -> None:
    parts = m3.to_hf(native)
    live = Live(parts)
    with live:
        made = m3.from_hf(parts)
    assert live.peak <= live.start
    assert all(made[n].data_ptr() == native[n].data_ptr() for n in native)
    assert alike(made, native)


def test_views_in_another_order_are_copied(native: State, m3: StateDictAdapter) -> None:
    name = "model.layers.1.mlp.experts.down_projs"
    parts = m3.to_hf({name: native[name]})
    two, three = (f"{L1}.block_sparse_moe.experts.{e}.w2.weight" for e in (2, 3))
    parts[two], parts[three] = parts[three], parts[two]
    assert same(m3.from_hf(parts)[name], native[name][[0, 1, 3, 2, 4, 5, 6, 7]])
    parts = m3.to_hf({name: native[name]})
    parts[two] = m3.to_hf({name: native[name] * 2})[two]
    made = m3.from_hf(parts)[name]
    assert same(made[2], native[name][2] * 2)
    assert same(made[3], native[name][3])


# --- the page


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mxfp8: State
) -> None:
    page = (ROOT / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    adapting.write(tmp_path / "MiniMax-M3-MXFP8", adapting.mtp_config(), mxfp8)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)  # noqa: S102
    assert names["native"]["model.layers.1.mlp.experts.down_projs"].shape == (8, 128, 128)
    json.dumps(sorted(names["adapter"].quantized))


def test_the_room_is_public() -> None:
    assert exporter.adapters.StateDictAdapter is StateDictAdapter
    assert MINIMAX_M3.scale == "weight_scale_inv"


@pytest.mark.parametrize(("old", "new"), [("Place", NativePrefix), ("Stack", NativeStack)])
def test_a_renamed_class_is_there_for_one_release(old: str, new: type) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is renamed to {new.__name__}"):
        assert getattr(adapters, old) is new
