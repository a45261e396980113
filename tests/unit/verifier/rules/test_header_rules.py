# SPDX-License-Identifier: Apache-2.0
"""Header rules where a corruptor cannot show it: what stays clean, what a base changes, and
options.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import verifier
from tests import sparse
from tests.paths import ROOT, TESTS
from verifier.cli import run
from verifier.errors import UsageError
from verifier.findings import Finding
from verifier.schemes import runtime_layout
from verifier.selftest import CheckpointEditor
from verifier.selftest.editor import read_shard, write_shard

DATA = TESTS / "data" / "modelopt"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
QWEN, NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
Copy = Callable[[Path], CheckpointEditor]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Return a function that copies a checkpoint to edit it."""

    def one(source: Path) -> CheckpointEditor:
        target = tmp_path / f"{source.parent.name}-{source.name}"
        target.mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
        return CheckpointEditor(target)

    return one


def said(folder: CheckpointEditor | Path, rule: str, **options: Any) -> list[Finding]:
    """Return what one rule says about a checkpoint."""
    return list(verifier.check(getattr(folder, "path", folder), **options).by_rule(rule))


def severities(found: list[Finding]) -> list[str]:
    return [f.severity for f in found]


CT_ARGS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
CT = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["re:.*experts.*"],
                "weights": CT_ARGS,
                "input_activations": CT_ARGS | {"dynamic": "local"},
            }
        },
        "ignore": ["lm_head"],
    }
}


@pytest.fixture
def packed(copy: Copy) -> CheckpointEditor:
    """Return NVFP4 as compressed-tensors writes it: packed weights, divisors of shape [1]."""
    folder = copy(NVFP4)
    shard = read_shard(folder.path / folder.shards[0])
    made = {}
    for name, (dtype, shape, data) in shard.entries.items():
        module, _, leaf = name.rpartition(".")
        new = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}.get(
            leaf
        )
        if new:
            value = 1 / np.frombuffer(data, np.float32)
            made[f"{module}.{new}"] = ("F32", (1,), value.astype(np.float32).tobytes())
        else:
            made[f"{module}.weight_packed" if dtype == "U8" else name] = (dtype, shape, data)
    shard.entries = made
    write_shard(folder.path / folder.shards[0], shard)
    folder.edit_json("config.json", lambda value: value.update(CT))
    folder.remove("hf_quant_config.json")
    return folder


def test_compressed_tensors_is_clean(packed: CheckpointEditor) -> None:
    for base in (None, QWEN):
        report = verifier.check(packed.path, base=base, depth="payload")
        assert report.findings == ()
        assert report.verdict == "passed"
        assert report.summary.contents.formats == {"NVFP4_PACK_QUANTIZED": 48}


EXPERT = "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("rule", "leaf", "change", "severity"),
    [
        (
            "QC307",
            "weight_scale",
            lambda v: np.pad(v.view(np.uint8), ((0, 0), (0, 1)))[:, :3].repeat(128, 0)[:512, 0],
            "error",
        ),
        ("QC311", "weight_global_scale", lambda v: v.reshape(()), "warning"),
        ("QC315", "weight_global_scale", lambda v: v.astype(ml_dtypes.bfloat16), "error"),
        ("QC315", "input_global_scale", lambda v: v.astype(np.float16), "error"),
    ],
)
def test_defects_of_compressed_tensors(
    packed: CheckpointEditor, rule: str, leaf: str, change: Any, severity: str
) -> None:
    name = f"{EXPERT}.{leaf}"
    values = change(packed.array(name))
    if values.dtype == np.uint8:
        values = values.view(ml_dtypes.float8_e4m3fn)
    packed.store(name, values)
    report = verifier.check(packed.path)
    assert [(f.rule, f.severity, f.where.tensor) for f in report.findings] == [
        (rule, severity, name)
    ]


def test_weight_packed_and_plain(packed: CheckpointEditor) -> None:
    packed.add(f"{EXPERT}.weight", np.zeros((128, 64), ml_dtypes.bfloat16))
    report = verifier.check(packed.path)
    assert [(f.rule, f.where.tensor) for f in report.findings] == [("QC313", f"{EXPERT}.weight")]


# QC107, QC109


def test_header_padded_beyond_the_gap_is_clean(copy: Copy) -> None:
    folder = copy(MXFP8)
    path = folder.path / folder.shards[0]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for size, reported in ((99_993, False), (99_994, True), (100_000, True), (100_001, False)):
        text = raw[8 : 8 + length].rstrip().ljust(size)
        path.write_bytes(size.to_bytes(8, "little") + text + raw[8 + length :])
        assert bool(said(folder, "QC107")) == reported, size


def test_absent_metadata_is_a_note(copy: Copy) -> None:
    folder = copy(MXFP8)
    path = folder.path / folder.shards[0]
    shard = read_shard(path)
    shard.metadata = {}
    write_shard(path, shard)
    assert severities(said(folder, "QC109")) == ["info"]
    assert verifier.check(folder.path, fail_on="warning").exit_code == 0


# QC110


def test_side_files_in_another_spelling_are_there(copy: Copy) -> None:
    """As transformers 5 writes them: one processor_config.json, and one tokenizer.json for
    vocab.json and merges.txt.
    """
    base, folder = copy(LLAMA), copy(MXFP8)
    for name in (
        "vocab.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ):
        (base.path / name).write_text("{}")
    (base.path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    for name in ("merges.txt", "README.md", "LICENSE"):
        (base.path / name).write_text("#version")
    assert {f.where.file for f in said(folder, "QC110", base=base.path)} == {
        "vocab.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    }
    (folder.path / "tokenizer.json").write_text("{}")
    (folder.path / "tokenizer_config.json").write_text("{}")
    (folder.path / "processor_config.json").write_text('{"image_processor": {}}')
    found = said(folder, "QC110", base=base.path)
    assert [f.where.file for f in found] == ["tokenizer_config.json"]
    assert "chat template" in found[0].message
    (folder.path / "chat_template.jinja").write_text("{{ messages }}")
    assert said(folder, "QC110", base=base.path) == []


def test_a_side_file_that_is_broken_is_told_once(copy: Copy) -> None:
    base, folder = copy(GOLDEN / "bf16"), copy(GOLDEN / "mxfp8")
    for text in (b"{", b"[]", "\ufeff{}".encode(), "{}".encode("utf-16"), b"[" * 100_000, b""):
        (folder.path / "tokenizer_config.json").write_bytes(text)
        found = said(folder, "QC110", base=base.path)
        assert [(f.severity, f.where.file) for f in found] == [
            ("error", "tokenizer_config.json")
        ], text[:9]


def test_large_vocabulary_is_held_to_its_ends(copy: Copy) -> None:
    folder = copy(GOLDEN / "mxfp8")
    text = '{"model": "' + "x" * 5_000_000 + '"}'
    (folder.path / "tokenizer.json").write_text(text + "\n")
    assert said(folder, "QC110") == []
    (folder.path / "tokenizer.json").write_text(text[:-1])
    assert severities(said(folder, "QC110")) == ["error"]


@pytest.mark.parametrize("value", [-3, 0, 10**30, "1", None, [1], {}, True])
def test_odd_numbers_in_a_config(copy: Copy, value: object) -> None:
    keys = (
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "num_mtp_modules",
        "num_nextn_predict_layers",
        "num_kv_shared_layers",
        "num_local_experts",
        "num_experts",
        "tie_word_embeddings",
        "text_config",
        "auto_map",
    )
    for key in keys:
        folder = copy(NVFP4)
        folder.edit_json(
            "config.json", lambda body, key=key: body.update({key: value, "model_type": "unknown"})
        )  # type: ignore[misc]
        report = verifier.check(folder.path, base=QWEN, tp=2, ep=2)
        assert report.exit_code in (0, 1), key
        assert all(c.of >= c.checked >= 0 for c in report.coverage), key
        shutil.rmtree(folder.path)


def test_code_that_the_base_names_and_lacks_is_its_habit(copy: Copy) -> None:
    base, folder = copy(LLAMA), copy(MXFP8)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "org/other--modeling_far.Far",
    }
    folder.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert severities(said(folder, "QC110")) == ["error"]
    assert severities(said(folder, "QC110", base=base.path)) == ["error"]
    base.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert severities(said(folder, "QC110", base=base.path)) == ["warning"]
    (folder.path / "configuration_own.py").write_text("from .configuration_own import OwnConfig\n")
    assert said(folder, "QC110", base=base.path) == []


@pytest.mark.parametrize(
    "auto_map",
    [7, {"a": None}, {"a": ["x", None]}, {"a": "../x.Y"}, {"a": ["t.S", None]}, {"a": "." * 99}],
)
def test_hostile_auto_maps(copy: Copy, auto_map: object) -> None:
    folder = copy(MXFP8)
    folder.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert [f.where.file for f in said(folder, "QC110")] == (
        ["t.py"] if auto_map == {"a": ["t.S", None]} else []
    )


def test_processor_that_the_tokenizer_names(copy: Copy) -> None:
    folder = copy(GOLDEN / "mxfp8")
    folder.edit_json(
        "tokenizer_config.json",
        lambda value: value.update({"processor_class": "MiniMaxVLProcessor"}),
    )
    assert severities(said(folder, "QC110")) == ["warning"]
    (folder.path / "preprocessor_config.json").write_text("{}")
    assert said(folder, "QC110") == []


@pytest.mark.parametrize(
    "text", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"]
)
def test_vocabulary_that_is_a_pointer(copy: Copy, text: str) -> None:
    folder = copy(MXFP8)
    (folder.path / "tokenizer.model").write_text(text)
    assert severities(said(folder, "QC110")) == ["error"]


# QC206


@pytest.mark.parametrize("count", [0, 1, 3])
def test_mtp_declared_and_shipped_by_nobody_is_clean(copy: Copy, count: int) -> None:
    base, folder = copy(GOLDEN / "bf16"), copy(GOLDEN / "mxfp8")
    for one in (base, folder):
        one.edit_json(
            "config.json", lambda value: value["text_config"].update({"num_mtp_modules": count})
        )
    for given in (None, base.path):
        report = verifier.check(folder.path, base=given)
        assert report.findings == ()
        assert report.verdict == "passed"


def test_fewer_mtp_modules_than_declared(copy: Copy) -> None:
    """Layers behind the last one are MTP modules too, as DeepSeek and GLM store them."""
    folder = copy(MXFP8)
    folder.edit_json(
        "config.json",
        lambda value: value.update({"num_nextn_predict_layers": 2, "model_type": "unknown"}),
    )
    assert said(folder, "QC206") == []
    folder.add("model.layers.2.enorm.weight", np.ones(128, np.float32))
    assert severities(said(folder, "QC206")) == ["warning"]
    folder.add("model.layers.3.enorm.weight", np.ones(128, np.float32))
    assert said(folder, "QC206") == []


def test_mtp_layer_of_the_base_is_missing_once(copy: Copy) -> None:
    base, folder = copy(LLAMA), copy(MXFP8)
    base.add("model.layers.2.enorm.weight", np.ones(128, np.float32))
    report = verifier.check(folder.path, base=base.path)
    assert [(f.rule, f.where.tensor) for f in report.findings] == [
        ("QC206", "model.layers.2.enorm.weight")
    ]


# QC307


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "said"),
    [
        ((64, 4), 64, 4, ""),
        ((128, 4), 64, 4, "padded"),
        ((64, 4), 64, 3, "padded"),
        ((128, 3), 64, 3, "padded"),
        ((512,), 64, 4, "swizzled"),
        ((1, 1, 32, 16), 64, 4, "swizzled"),
        ((1, 2, 32, 4, 4), 128, 8, "swizzled"),
        ((32, 32), 64, 8, "swizzled"),
        ((1024,), 128, 8, "swizzled"),
        ((64, 3), 64, 4, ""),
        ((4, 64), 64, 4, ""),
        ((8, 128), 128, 8, ""),
        ((256, 4), 64, 4, ""),
        ((), 64, 4, ""),
        ((0,), 0, 0, ""),
    ],
)
def test_runtime_layouts(shape: tuple[int, ...], rows: int, columns: int, said: str) -> None:
    assert runtime_layout(shape, rows, columns) == said


def test_padded_mxfp8_scale_without_a_declaration(copy: Copy) -> None:
    """As compressed-tensors declares it, in a dialect that is not read: dtypes alone show the
    format.
    """
    folder = copy(MXFP8)
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    folder.store(name, np.pad(folder.array(name), ((0, 64), (0, 0))))
    foreign = {"quantization_config": {"quant_method": "compressed-tensors"}}
    folder.edit_json("config.json", lambda value: value.update(foreign))
    folder.remove("hf_quant_config.json")
    assert [f.where.tensor for f in said(folder, "QC307")] == [name]


# QC309


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"tp": 1}, set()),
        ({"ep": 8}, set()),
        ({"tp": 2, "ep": 2}, set()),
        ({"tp": 2}, {("warning", "gate_proj"), ("warning", "up_proj")}),
        ({"tp": 4, "ep": 2}, {("warning", "gate_proj"), ("warning", "up_proj")}),
        ({"tp": 4, "ep": 3}, {("warning", "config.json")}),
        ({"ep": 16}, {("error", "config.json")}),
        (
            {"tp": 8},
            {
                ("error", "config.json"),
                ("warning", "gate_proj"),
                ("warning", "up_proj"),
                ("error", "down_proj"),
            },
        ),
        (
            {"tp": 3, "ep": 3},
            {
                ("error", "config.json"),
                ("warning", "config.json"),
                ("error", "q_proj"),
                ("error", "o_proj"),
            },
        ),
    ],
)
def test_nvfp4_over_ranks(options: dict[str, int], reported: set[tuple[str, str]]) -> None:
    """Experts of 64 x 128 and 128 x 64, four heads, two of keys and values, eight experts."""
    report = verifier.check(NVFP4, **options)
    found = {
        (f.severity, f.where.tensor.split(".")[-2] if f.where.tensor else f.where.file)
        for f in report.findings
    }
    assert found == reported
    assert {f.rule for f in report.findings} <= {"QC309"}
    assert report.summary.options.tp == options.get("tp")


def test_a_shard_cuts_a_byte(copy: Copy) -> None:
    folder = copy(NVFP4)
    folder.edit_json(
        "config.json",
        lambda value: value.update({"num_attention_heads": 64, "num_key_value_heads": 64}),
    )
    messages = [f.message for f in said(folder, "QC309", tp=64) if f.severity == "error"]
    assert messages == ["NVFP4: TP shard boundary splits a quantization block and a packed byte"]


def test_one_value_head_stands_on_many_ranks() -> None:
    """Two heads of keys on four ranks: two ranks hold the same one, and 32 of 64 rows each."""
    assert said(LLAMA, "QC309", tp=4) == []
    assert {
        f.where.tensor for f in said(MXFP8, "QC309", tp=4) if "k_proj" in str(f.where.tensor)
    } == {"model.layers.0.self_attn.k_proj.weight"}


def _block_fp8(folder: CheckpointEditor) -> CheckpointEditor:
    """Quantize the projections of a copy to 128x128 block FP8; values do not matter here."""
    shard = read_shard(folder.path / folder.shards[0])
    for name, (_, shape, _) in list(shard.entries.items()):
        if name.endswith("_proj.weight"):
            shard.entries[name] = ("F8_E4M3", shape, bytes([56]) * (shape[0] * shape[1]))
            tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
            shard.entries[f"{name}_scale_inv"] = (
                "F32",
                tiles,
                np.ones(tiles, np.float32).tobytes(),
            )
    write_shard(folder.path / folder.shards[0], shard)
    declared = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    folder.edit_json("config.json", lambda value: value.update({"quantization_config": declared}))
    return folder


@pytest.mark.parametrize(
    ("tp", "reported"),
    [
        (None, set()),
        (1, {"k_proj"}),  # 64 rows within the fused qkv, values behind them; q has 128, gate 256
        (2, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (4, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_block_fp8_over_ranks(copy: Copy, tp: int | None, reported: set[str]) -> None:
    report = verifier.check(_block_fp8(copy(LLAMA)).path, tp=tp)
    assert {str(f.where.tensor).split(".")[-2] for f in report.findings} == reported
    assert {(f.rule, f.severity) for f in report.findings} <= {("QC309", "error")}


def test_no_ranks_is_usage() -> None:
    for options in ({"tp": 0}, {"ep": -1}):
        with pytest.raises(UsageError):
            verifier.check(NVFP4, **options)


def test_ranks_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(NVFP4), "--tp", "2", "--ep", "2"]) == 0
    assert run(["check", str(NVFP4), "--tp", "8"]) == 1
    assert "QC309" in capsys.readouterr().out
    assert run(["check", str(NVFP4), "--tp", "0"]) == 2


# QC311, QC312, QC315


def test_scalars_of_one_shape_are_clean(copy: Copy) -> None:
    folder = copy(NVFP4)
    path = folder.path / folder.shards[0]
    shard = read_shard(path)
    shard.entries = {n: (d, s or (1,), b) for n, (d, s, b) in shard.entries.items()}
    write_shard(path, shard)
    assert verifier.check(folder.path, depth="payload").findings == ()


def _declare_kv(folder: CheckpointEditor) -> None:
    scheme = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    folder.edit_json("config.json", lambda value: value["quantization_config"].update(scheme))
    folder.edit_json(
        "hf_quant_config.json",
        lambda value: value["quantization"].update({"kv_cache_quant_algo": "FP8"}),
    )


@pytest.mark.parametrize("source", [NVFP4, MXFP8])
def test_kv_declared_by_constant_cast_is_clean(copy: Copy, source: Path) -> None:
    folder = copy(source)
    _declare_kv(folder)
    for base in (None, LLAMA if source is MXFP8 else QWEN):
        report = verifier.check(folder.path, base=base, depth="payload")
        assert report.findings == ()
        assert report.verdict == "passed"


@pytest.mark.parametrize(
    "places",
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
    ],
)
def test_kv_scales_at_known_places_are_clean(copy: Copy, places: tuple[str, str]) -> None:
    folder = copy(MXFP8)
    _declare_kv(folder)
    for layer in range(2):
        for place in places:
            folder.add(f"model.layers.{layer}.self_attn.{place}", np.asarray(0.03, np.float32))
    assert verifier.check(folder.path, base=LLAMA, depth="payload").findings == ()
    folder.drop([f"model.layers.1.self_attn.{places[1]}"])
    found = verifier.check(folder.path).findings
    wanted = f"model.layers.1.self_attn.{places[1].replace('attn.', '')}"
    assert [(f.rule, f.severity, f.where.tensor) for f in found] == [("QC312", "error", wanted)]


def test_scales_of_compressed_tensors_may_be_bf16(copy: Copy) -> None:
    """It stores FP8 scales in the model's dtype, and readers of ModelOpt's widen them as well; all
    in one dtype.
    """
    folder = copy(LLAMA)
    shard = read_shard(folder.path / folder.shards[0])
    for name, (_, shape, data) in list(shard.entries.items()):
        if name.endswith("_proj.weight"):
            codes = np.frombuffer(data, ml_dtypes.bfloat16).astype(ml_dtypes.float8_e4m3fn)
            shard.entries[name] = ("F8_E4M3", shape, codes.tobytes())
            scale = np.ones((shape[0], 1), ml_dtypes.bfloat16)
            shard.entries[f"{name}_scale"] = ("BF16", scale.shape, scale.tobytes())
    write_shard(folder.path / folder.shards[0], shard)
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": fp8}}
    declared = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    declared |= {"config_groups": groups, "ignore": ["lm_head"]}
    folder.edit_json("config.json", lambda value: value.update({"quantization_config": declared}))
    assert verifier.check(folder.path).findings == ()
    declared = {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "ignore": ["lm_head"],
    }
    folder.edit_json("config.json", lambda value: value.update({"quantization_config": declared}))
    assert verifier.check(folder.path).findings == ()
    name = "model.layers.1.self_attn.q_proj.weight_scale"
    folder.store(name, folder.array(name).astype(np.float32))
    assert [f.where.tensor for f in said(folder, "QC304")] == [name]


@pytest.mark.parametrize(
    "extra", ["model.layers.1.self_attn.A_log", "model.layers.1.self_attn.k_conv1d.weight"]
)
def test_linear_attention_has_no_cache(copy: Copy, extra: str) -> None:
    folder = copy(MXFP8)
    _declare_kv(folder)
    for one in "kv":
        folder.add(f"model.layers.0.self_attn.{one}_proj.{one}_scale", np.asarray(0.03, np.float32))
    assert len(said(folder, "QC312")) == 2
    folder.add(extra, np.ones(4, np.float32))
    assert said(folder, "QC312") == []


def test_layers_that_share_a_cache_are_not_judged(copy: Copy) -> None:
    folder = copy(MXFP8)
    _declare_kv(folder)
    for one in "kv":
        folder.add(f"model.layers.0.self_attn.{one}_proj.{one}_scale", np.asarray(0.03, np.float32))
    folder.edit_json("config.json", lambda value: value.update({"num_kv_shared_layers": 1}))
    report = verifier.check(folder.path)
    assert report.by_rule("QC312") == ()
    assert [(c.checked, c.of) for c in report.coverage if c.rule == "QC312"] == [(2, 4)]


# QC313


def _tied(folder: CheckpointEditor, *, drop: bool = True) -> CheckpointEditor:
    folder.edit_json("config.json", lambda value: value.update({"tie_word_embeddings": True}))
    if drop:
        folder.drop(["lm_head.weight"])
    return folder


@pytest.mark.parametrize(("source", "quantized"), [(QWEN, NVFP4), (LLAMA, MXFP8)])
def test_tied_heads_are_clean(copy: Copy, source: Path, quantized: Path) -> None:
    base, folder = _tied(copy(source)), _tied(copy(quantized))
    for given in (None, base.path):
        report = verifier.check(folder.path, base=given, depth="payload")
        assert report.findings == ()
        assert report.verdict == "passed"


def test_tied_head_that_the_base_stores_too_is_its_habit(copy: Copy) -> None:
    base, folder = _tied(copy(LLAMA), drop=False), _tied(copy(MXFP8), drop=False)
    assert verifier.check(folder.path, base=base.path).findings == ()
    assert [(f.rule, f.severity) for f in verifier.check(folder.path).findings] == [
        ("QC313", "warning")
    ]


def test_tied_head_that_is_quantized(copy: Copy) -> None:
    folder = _tied(copy(MXFP8), drop=False)
    folder.store("lm_head.weight", folder.array("lm_head.weight").astype(ml_dtypes.float8_e4m3fn))
    folder.add("lm_head.weight_scale", np.full((512, 4), 127, np.uint8))
    assert severities(said(folder, "QC313")) == ["error"]


def test_flags_that_disagree_tie_nothing(copy: Copy) -> None:
    folder = _tied(copy(MXFP8), drop=False)
    folder.edit_json(
        "config.json", lambda value: value.update({"text_config": {"tie_word_embeddings": False}})
    )
    assert said(folder, "QC313") == []


# QC314


def _with_biases(folder: CheckpointEditor, without: str = "") -> CheckpointEditor:
    """Give every expert's down projection a bias, as gpt-oss has, except one."""
    names = [n for n in folder.tensors() if ".experts." in n and n.endswith("down_proj.weight")]
    shard = read_shard(folder.path / folder.shards[0])
    for name in names:
        bias = name.removesuffix("weight") + "bias"
        if bias != without:
            shard.entries[bias] = ("BF16", (128,), bytes(256))
    write_shard(folder.path / folder.shards[0], shard)
    return folder


def test_bias_of_one_expert_with_and_without_base(copy: Copy) -> None:
    name = f"{EXPERT}.bias"
    base, whole = _with_biases(copy(QWEN)), _with_biases(copy(NVFP4))
    assert verifier.check(whole.path, base=base.path).findings == ()
    whole.drop([name])
    found = verifier.check(whole.path, base=base.path).findings
    assert [(f.rule, f.severity, f.where.tensor) for f in found] == [("QC314", "error", name)]
    whole.edit_json("config.json", lambda value: value.update({"model_type": "unknown"}))
    assert [(f.severity, f.where.tensor) for f in said(whole, "QC314")] == [("error", name)]


def test_bias_of_one_layer_is_a_warning_where_nothing_is_known(copy: Copy) -> None:
    folder = copy(MXFP8)
    folder.edit_json("config.json", lambda value: value.update({"model_type": "unknown"}))
    folder.add("model.layers.0.self_attn.q_proj.bias", np.zeros(128, ml_dtypes.bfloat16))
    assert [(f.severity, f.where.tensor) for f in said(folder, "QC314")] == [
        ("warning", "model.layers.1.self_attn.q_proj.bias")
    ]


# Every format


def _fp8(folder: CheckpointEditor, how: str) -> CheckpointEditor:
    """Quantize the projections of a copy to FP8 with a scale for each tensor or row; values do not
    matter here.
    """
    shard = read_shard(folder.path / folder.shards[0])
    for name, (_, shape, _) in list(shard.entries.items()):
        if name.endswith("_proj.weight"):
            shard.entries[name] = ("F8_E4M3", shape, bytes([56]) * (shape[0] * shape[1]))
            scale = np.ones(() if how == "FP8" else shape[:1], np.float32)
            shard.entries[f"{name}_scale"] = ("F32", scale.shape, scale.tobytes())
            if how == "FP8":
                shard.entries[f"{name.removesuffix('weight')}input_scale"] = (
                    "F32",
                    (),
                    scale.tobytes(),
                )
    write_shard(folder.path / folder.shards[0], shard)
    declared = {"quant_method": "modelopt", "quant_algo": how, "ignore": ["lm_head"]}
    folder.edit_json("config.json", lambda value: value.update({"quantization_config": declared}))
    return folder


def _weight_only(folder: CheckpointEditor) -> CheckpointEditor:
    folder.drop([n for n in folder.tensors() if n.endswith(".input_scale")])
    for file, key in (
        ("config.json", "quantization_config"),
        ("hf_quant_config.json", "quantization"),
    ):
        folder.edit_json(
            file, lambda value, key=key: value[key].update({"quant_algo": "W4A16_NVFP4"})
        )  # type: ignore[misc]

    def weights_alone(value: dict[str, Any]) -> None:
        for group in value["quantization_config"].get("config_groups", {}).values():
            group["input_activations"] = None

    folder.edit_json("config.json", weights_alone)
    return folder


FORMATS: dict[str, Callable[[Copy], CheckpointEditor]] = {
    "nvfp4": lambda copy: copy(NVFP4),
    "w4a16_nvfp4": lambda copy: _weight_only(copy(NVFP4)),
    "mxfp8": lambda copy: copy(MXFP8),
    "fp8": lambda copy: _fp8(copy(LLAMA), "FP8"),
    "fp8_per_channel": lambda copy: _fp8(copy(LLAMA), "FP8_PER_CHANNEL_PER_TOKEN"),
    "fp8_block": lambda copy: _block_fp8(copy(LLAMA)),
}


@pytest.fixture(params=[*FORMATS, "nvfp4_ct"])
def any_format(request: pytest.FixtureRequest, copy: Copy) -> CheckpointEditor:
    if request.param == "nvfp4_ct":
        made: CheckpointEditor = request.getfixturevalue("packed")
        return made
    return FORMATS[request.param](copy)


def _down(folder: CheckpointEditor) -> str:
    """Return the last layer's last down projection."""
    return [m for m in folder.modules() if m.endswith("down_proj")][-1]


def test_every_format_is_clean(any_format: CheckpointEditor) -> None:
    report = verifier.check(any_format.path)
    assert report.findings == ()
    assert report.verdict == "passed"


def test_plain_weight_beside_scales_in_every_format(any_format: CheckpointEditor) -> None:
    module = _down(any_format)
    name = next(
        n for n in any_format.tensors() if n in (f"{module}.weight", f"{module}.weight_packed")
    )
    out, width = any_format.tensors()[name].shape
    any_format.drop([name])
    width *= (
        2 if any_format.tensors().get(f"{module}.weight_scale_2") or name.endswith("packed") else 1
    )
    any_format.add(f"{module}.weight", np.full((out, width), 0.01, ml_dtypes.bfloat16))
    report = verifier.check(any_format.path)
    assert [(f.rule, f.where.tensor) for f in report.findings] == [("QC313", f"{module}.weight")]


def test_buffers_wrappers_and_siblings_in_every_format(any_format: CheckpointEditor) -> None:
    module = _down(any_format)
    any_format.add(f"{module}.input_quantizer._amax", np.ones((), np.float32))
    any_format.add(
        f"{module.rpartition('.')[0]}.up_proj.pre_quant_scale", np.ones(128, ml_dtypes.bfloat16)
    )
    any_format.rename({"model.norm.weight": "model.norm._orig_mod.weight"})
    found = {f.rule for f in verifier.check(any_format.path).findings}
    assert found == {"QC111", "QC209", "QC314", "QC408"}


def test_kv_scales_in_every_format(any_format: CheckpointEditor) -> None:
    for layer in range(2):
        for one in "kv":
            any_format.add(
                f"model.layers.{layer}.self_attn.{one}_proj.{one}_scale",
                np.asarray(0.03, np.float32),
            )
    found = verifier.check(any_format.path).findings
    assert [(f.rule, f.severity) for f in found] == [("QC312", "warning")]
    any_format.drop(["model.layers.1.self_attn.k_proj.k_scale"])
    assert severities(said(any_format, "QC312", depth="payload"))[0] == "error"


def test_real_release_over_its_ranks(tmp_path: Path) -> None:
    """MiniMax-M3 as released, on eight ranks: no alarm, and one MTP module declared without tensors
    is no error.
    """
    release = sparse.mixed(sparse.rows())
    config = sparse.m3_config() | {"quantization_config": sparse.release_quantization(release)}
    config["text_config"] |= {
        "num_mtp_modules": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
    }  # type: ignore[operator]
    path = sparse.write(tmp_path / "release", release, config, 60)
    report = verifier.check(path, tp=8, ep=8)
    assert {(f.rule, f.severity) for f in report.findings} == {
        ("QC414", "info")
    }  # MXFP8 shared experts beside NVFP4
    assert report.verdict == "passed"
    assert said(path, "QC309", tp=8) == []
    reported = {
        (f.severity, f.message) for f in said(path, "QC309", tp=16)
    }  # 3072 / 16 = 192 rows of an expert
    assert reported == {
        ("warning", f"{algo}: kernels pad a shard to tiles of 128 rows")
        for algo in ("NVFP4", "MXFP8")
    }
