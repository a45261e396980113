# SPDX-License-Identifier: Apache-2.0
"""Header rules where a corruptor cannot show it: what stays clean, what a base changes, and options."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verifier
from verifier.cli import run
from verifier.corrupt import Folder
from verifier.corrupt.edit import read_shard, write_shard
from verifier.errors import UsageError
from verifier.findings import Finding
from verifier.schemes import runtime_layout

DATA = Path(__file__).parents[2] / "data" / "modelopt"
GOLDEN = Path(__file__).parents[3] / "goldens" / "minimax-m3-tiny"
QWEN, NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
Copy = Callable[[Path], Folder]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Return a function that copies a checkpoint to edit it."""

    def one(source: Path) -> Folder:
        target = tmp_path / f"{source.parent.name}-{source.name}"
        target.mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
        return Folder(target)

    return one


def said(folder: Folder | Path, rule: str, **options: Any) -> list[Finding]:
    """Return what one rule says about a checkpoint."""
    return list(verifier.check(getattr(folder, "path", folder), **options).by_rule(rule))


def severities(found: list[Finding]) -> list[str]:
    return [f.severity for f in found]


# QC107, QC109


def test_header_padded_beyond_the_gap_is_clean(copy: Copy) -> None:
    folder = copy(MXFP8)
    path = folder.path / folder.shards[0]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for size, told in ((99_993, False), (99_994, True), (100_000, True), (100_001, False)):
        text = raw[8 : 8 + length].rstrip().ljust(size)
        path.write_bytes(size.to_bytes(8, "little") + text + raw[8 + length :])
        assert bool(said(folder, "QC107")) == told, size


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
    """As transformers 5 writes them: one processor_config.json, and one tokenizer.json for vocab.json and merges.txt."""
    base, folder = copy(LLAMA), copy(MXFP8)
    for name in ("vocab.json", "special_tokens_map.json", "tokenizer_config.json", "preprocessor_config.json"):
        (base.path / name).write_text("{}")
    (base.path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    for name in ("merges.txt", "README.md", "LICENSE"):
        (base.path / name).write_text("#version")
    assert {f.where.file for f in said(folder, "QC110", base=base.path)} == {
        "vocab.json", "tokenizer_config.json", "preprocessor_config.json",
    }  # fmt: skip
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
        assert [(f.severity, f.where.file) for f in found] == [("error", "tokenizer_config.json")], text[:9]


def test_code_that_the_base_names_and_lacks_is_its_habit(copy: Copy) -> None:
    base, folder = copy(LLAMA), copy(MXFP8)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "org/other--modeling_far.Far"}
    folder.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert severities(said(folder, "QC110")) == ["error"]
    assert severities(said(folder, "QC110", base=base.path)) == ["error"]
    base.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert severities(said(folder, "QC110", base=base.path)) == ["warning"]
    (folder.path / "configuration_own.py").write_text("from .configuration_own import OwnConfig\n")
    assert said(folder, "QC110", base=base.path) == []


@pytest.mark.parametrize(
    "auto_map", [7, {"a": None}, {"a": ["x", None]}, {"a": "../x.Y"}, {"a": ["t.S", None]}, {"a": "." * 99}]
)
def test_hostile_auto_maps(copy: Copy, auto_map: object) -> None:
    folder = copy(MXFP8)
    folder.edit_json("config.json", lambda value: value.update({"auto_map": auto_map}))
    assert [f.where.file for f in said(folder, "QC110")] == (["t.py"] if auto_map == {"a": ["t.S", None]} else [])


@pytest.mark.parametrize("text", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_vocabulary_that_is_a_pointer(copy: Copy, text: str) -> None:
    folder = copy(MXFP8)
    (folder.path / "tokenizer.model").write_text(text)
    assert severities(said(folder, "QC110")) == ["error"]


# QC206


@pytest.mark.parametrize("count", [0, 1, 3])
def test_mtp_declared_and_shipped_by_nobody_is_clean(copy: Copy, count: int) -> None:
    base, folder = copy(GOLDEN / "bf16"), copy(GOLDEN / "mxfp8")
    for one in (base, folder):
        one.edit_json("config.json", lambda value: value["text_config"].update({"num_mtp_modules": count}))
    for given in (None, base.path):
        report = verifier.check(folder.path, base=given)
        assert report.findings == ()
        assert report.verdict == "passed"


def test_fewer_mtp_modules_than_declared(copy: Copy) -> None:
    """Layers behind the last one are MTP modules too, as DeepSeek and GLM store them."""
    folder = copy(MXFP8)
    folder.edit_json("config.json", lambda value: value.update({"num_nextn_predict_layers": 2, "model_type": "unknown"}))
    assert said(folder, "QC206") == []
    folder.add("model.layers.2.enorm.weight", np.ones(128, np.float32))
    assert severities(said(folder, "QC206")) == ["warning"]
    folder.add("model.layers.3.enorm.weight", np.ones(128, np.float32))
    assert said(folder, "QC206") == []


def test_mtp_layer_of_the_base_is_missing_once(copy: Copy) -> None:
    base, folder = copy(LLAMA), copy(MXFP8)
    base.add("model.layers.2.enorm.weight", np.ones(128, np.float32))
    report = verifier.check(folder.path, base=base.path)
    assert [(f.rule, f.where.tensor) for f in report.findings] == [("QC206", "model.layers.2.enorm.weight")]


# QC307


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "said"),
    [
        ((64, 4), 64, 4, ""), ((128, 4), 64, 4, "padded"), ((64, 4), 64, 3, "padded"), ((128, 3), 64, 3, "padded"),
        ((512,), 64, 4, "swizzled"), ((1, 1, 32, 16), 64, 4, "swizzled"), ((1, 2, 32, 4, 4), 128, 8, "swizzled"),
        ((32, 32), 64, 8, "swizzled"), ((1024,), 128, 8, "swizzled"), ((64, 3), 64, 4, ""), ((4, 64), 64, 4, ""),
        ((8, 128), 128, 8, ""), ((256, 4), 64, 4, ""), ((), 64, 4, ""), ((0,), 0, 0, ""),
    ],
)  # fmt: skip
def test_runtime_layouts(shape: tuple[int, ...], rows: int, columns: int, said: str) -> None:
    assert runtime_layout(shape, rows, columns) == said


def test_padded_mxfp8_scale_without_a_declaration(copy: Copy) -> None:
    """As compressed-tensors declares it, in a dialect that is not read: dtypes alone show the format."""
    folder = copy(MXFP8)
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    folder.store(name, np.pad(folder.array(name), ((0, 64), (0, 0))))
    foreign = {"quantization_config": {"quant_method": "compressed-tensors"}}
    folder.edit_json("config.json", lambda value: value.update(foreign))
    folder.remove("hf_quant_config.json")
    assert [f.where.tensor for f in said(folder, "QC307")] == [name]


# QC309


@pytest.mark.parametrize(("options", "told"), [
    ({"tp": 1}, set()),
    ({"ep": 8}, set()),
    ({"tp": 2, "ep": 2}, set()),
    ({"tp": 2}, {("warning", "gate_proj"), ("warning", "up_proj")}),
    ({"tp": 4, "ep": 2}, {("warning", "gate_proj"), ("warning", "up_proj")}),
    ({"tp": 4, "ep": 3}, {("warning", "config.json")}),
    ({"ep": 16}, {("error", "config.json")}),
    ({"tp": 8}, {("error", "config.json"), ("warning", "gate_proj"), ("warning", "up_proj"), ("error", "down_proj")}),
    ({"tp": 3, "ep": 3}, {("error", "config.json"), ("warning", "config.json"), ("error", "q_proj"), ("error", "o_proj")}),
])  # fmt: skip
def test_nvfp4_over_ranks(options: dict[str, int], told: set[tuple[str, str]]) -> None:
    """Experts of 64 x 128 and 128 x 64, four heads, two of keys and values, eight experts."""
    report = verifier.check(NVFP4, **options)
    found = {(f.severity, f.where.tensor.split(".")[-2] if f.where.tensor else f.where.file) for f in report.findings}
    assert found == told
    assert {f.rule for f in report.findings} <= {"QC309"}
    assert report.stats["options"]["tp"] == options.get("tp")


def test_a_shard_cuts_a_byte(copy: Copy) -> None:
    folder = copy(NVFP4)
    folder.edit_json("config.json", lambda value: value.update({"num_attention_heads": 64, "num_key_value_heads": 64}))
    messages = [f.message for f in said(folder, "QC309", tp=64) if f.severity == "error"]
    assert messages == ["NVFP4: a shard cuts a block, and a packed byte"]


def test_one_value_head_stands_on_many_ranks() -> None:
    """Two heads of keys on four ranks: two ranks hold the same one, and 32 of 64 rows each."""
    assert said(LLAMA, "QC309", tp=4) == []
    assert {f.where.tensor for f in said(MXFP8, "QC309", tp=4) if "k_proj" in str(f.where.tensor)} == {
        "model.layers.0.self_attn.k_proj.weight"
    }


def test_no_ranks_is_usage() -> None:
    for options in ({"tp": 0}, {"ep": -1}):
        with pytest.raises(UsageError):
            verifier.check(NVFP4, **options)


def test_ranks_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(NVFP4), "--tp", "2", "--ep", "2"]) == 0
    assert run(["check", str(NVFP4), "--tp", "8"]) == 1
    assert "QC309" in capsys.readouterr().out
    assert run(["check", str(NVFP4), "--tp", "0"]) == 2
