# SPDX-License-Identifier: Apache-2.0
"""What `diff` tells of two checkpoints: every kind of difference, made by editing bytes of a real
one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests import sparse
from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import ContentError, NotACheckpointError, UsageError
from verifier.inspect.diff import Diff, diff
from verifier.inspect.names import gathered
from verifier.inspect.render import LINES, diff_text
from verifier.selftest.editor import CheckpointEditor

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, LLAMA_MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(tmp_path: Path) -> CheckpointEditor:
    return CheckpointEditor(Path(shutil.copytree(QWEN_NVFP4, tmp_path / "copy")))


def kinds(found: Diff) -> list[tuple[str, str, int]]:
    return [(c.kind, c.names.label, c.names.count) for c in found.changes]


@pytest.mark.parametrize("folder", [QWEN, QWEN_NVFP4, LLAMA, LLAMA_MXFP8], ids=lambda p: p.name)
def test_a_checkpoint_equals_itself(folder: Path) -> None:
    found = diff(folder, folder, payload=True)
    assert found.equal
    assert found.changes == ()
    assert found.compared == found.common == len(CheckpointEditor(folder).tensors())
    assert diff_text(found).splitlines()[-1].startswith("equal: ")


def test_a_base_and_its_quantized_copy() -> None:
    found = diff(QWEN, QWEN_NVFP4)
    assert not found.equal
    experts = "model.layers.{0-1}.mlp.experts.{0-7}"
    assert {c.names.label: (c.a, c.b, c.names.count) for c in found.of("dtype and shape")} == {
        f"{experts}.down_proj.weight": ("BF16 [128, 64]", "U8 [128, 32]", 16),
        f"{experts}.gate_proj.weight": ("BF16 [64, 128]", "U8 [64, 64]", 16),
        f"{experts}.up_proj.weight": ("BF16 [64, 128]", "U8 [64, 64]", 16),
    }
    assert sum(c.names.count for c in found.of("only B") if not c.file) == 144
    assert found.of("only A", "dtype", "shape", "bytes") == ()
    assert (
        found.a.precision[("routed_expert", "BF16")]
        == found.b.precision[("routed_expert", "NVFP4")]
        == 48
    )
    assert [c.names.label for c in found.of("only B") if c.file] == ["hf_quant_config.json"]
    assert ("", '"NVFP4"') in {(c.a, c.b) for c in found.of("config")}


def test_the_other_way_round_is_the_mirror() -> None:
    there, back = diff(LLAMA, LLAMA_MXFP8, payload=True), diff(LLAMA_MXFP8, LLAMA, payload=True)
    mirror = {"only A": "only B", "only B": "only A"}
    assert {(mirror.get(c.kind, c.kind), c.names.label, c.b, c.a) for c in there.changes} == {
        (c.kind, c.names.label, c.a, c.b) for c in back.changes
    }


def test_a_name_a_dtype_and_a_shape(copy: CheckpointEditor) -> None:
    copy.rename({Q_PROJ: "model.layers.1.self_attn.q.weight"})
    copy.store("model.norm.weight", copy.array("model.norm.weight").astype(np.float32))
    copy.store("model.layers.0.self_attn.q_norm.weight", np.ones(7, ml_dtypes.bfloat16))
    found = diff(QWEN_NVFP4, copy.path)
    assert kinds(found) == [
        ("only A", Q_PROJ, 1),
        ("only B", "model.layers.1.self_attn.q.weight", 1),
        ("shape", "model.layers.0.self_attn.q_norm.weight", 1),
        ("dtype", "model.norm.weight", 1),
    ]
    text = diff_text(found)
    assert "BF16 [128] → F32 [128]" in text
    assert text.splitlines()[-1] == "different: 4 groups of differences"


def test_one_missing_expert_shows_that_the_ranges_span_more(copy: CheckpointEditor) -> None:
    copy.drop(
        [f"model.layers.{i}.mlp.experts.{j}.up_proj.input_scale" for i, j in ((0, 2), (1, 5))]
    )
    text = diff_text(diff(QWEN_NVFP4, copy.path))
    names = "model.layers.{0-1}.mlp.experts.{2,5}.up_proj.input_scale"
    assert f"     2  {names}  F32 []  (of 4 in these ranges)" in text


def test_bytes_are_compared_on_request_only(copy: CheckpointEditor) -> None:
    copy.overwrite(Q_PROJ, 5, b"\x80\x3f")
    copy.overwrite(Q_PROJ, 9, b"\x80\x3f")
    before = CheckpointEditor(QWEN_NVFP4).array(Q_PROJ).reshape(-1).astype(np.float64)
    assert diff(QWEN_NVFP4, copy.path).equal
    found = diff(QWEN_NVFP4, copy.path, payload=True)
    assert kinds(found) == [("bytes", Q_PROJ, 1)]
    largest = max(abs(1 - before[5]), abs(1 - before[9]))
    assert found.changes[0].a == f"2 of {before.size:,} elements differ, by at most {largest:.3g}"
    raw = CheckpointEditor(QWEN_NVFP4).read(Q_PROJ)[10:12].hex()
    assert found.changes[0].b == f"first at byte 10: {raw} → 803f"


def test_progress_ends_with_all_bytes() -> None:
    calls: list[tuple[int, int]] = []
    diff(LLAMA, LLAMA, payload=True, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (sum(t.nbytes for t in CheckpointEditor(LLAMA).tensors().values()),) * 2


def test_another_split_into_shards_is_no_difference(copy: CheckpointEditor) -> None:
    (copy.path / "model.safetensors").rename(copy.path / "weights.safetensors")
    assert diff(QWEN_NVFP4, copy.path, payload=True).equal


def test_other_files_are_told_and_not_judged(copy: CheckpointEditor) -> None:
    (copy.path / "generation_config.json").unlink()
    (copy.path / "notes.txt").write_text("x")
    found = diff(QWEN_NVFP4, copy.path)
    assert found.equal
    assert found.files == ("generation_config.json only in A", "notes.txt only in B")


QC = "quantization_config"
Edit = Callable[[dict[str, object]], None]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(hidden_size=1), ("hidden_size", "128", "1")),
        (lambda c: c.update(hidden_size=128.0), ("hidden_size", "128", "128.0")),
        (lambda c: c.update(tie_word_embeddings=0), ("tie_word_embeddings", "false", "0")),
        (lambda c: c.update(added=None), ("added", "", "null")),
        (lambda c: c.pop("hidden_size"), ("hidden_size", "128", "")),
        (lambda c: c[QC].update(quant_algo="FP8"), (f"{QC}.quant_algo", '"NVFP4"', '"FP8"')),
        (lambda c: c[QC]["ignore"].remove("lm_head"), (f"{QC}.ignore: lm_head", "listed", "")),
        (lambda c: c[QC]["ignore"].append("x"), (f"{QC}.ignore: x", "", "listed")),
        (
            lambda c: c[QC]["ignore"].reverse(),
            (f"{QC}.ignore", "the same entries", "in a different order"),
        ),
    ],
)
def test_a_config_field(copy: CheckpointEditor, edit: Edit, expected: tuple[str, str, str]) -> None:
    copy.edit_json("config.json", edit)
    found = diff(QWEN_NVFP4, copy.path)
    assert [(c.file, c.names.label, c.a, c.b) for c in found.changes] == [
        ("config.json", *expected)
    ]


def test_a_layers_worth_of_config_entries_is_one_line(copy: CheckpointEditor) -> None:
    layers = {
        f"model.layers.{i}.mlp.experts.{j}.w1": {"quant_algo": "NVFP4"}
        for i in range(3)
        for j in range(8)
    }
    copy.edit_json(
        "hf_quant_config.json", lambda c: c["quantization"].update(quantized_layers=layers)
    )
    found = diff(QWEN_NVFP4, copy.path)
    label = "quantization.quantized_layers.model.layers.{0-2}.mlp.experts.{0-7}.w1.quant_algo"
    assert kinds(found) == [("config", label, 24)]


def test_what_cannot_be_read_whole_is_never_equal(copy: CheckpointEditor) -> None:
    shard = copy.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    found = diff(copy.path, copy.path)
    assert found.changes == ()
    assert not found.equal
    assert "cannot be read completely: model.safetensors: ends 8 bytes early" in diff_text(found)


def test_an_index_that_names_a_missing_shard_is_never_equal(copy: CheckpointEditor) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": {Q_PROJ: "model-00002.safetensors"}}
    (copy.path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not diff(copy.path, copy.path).equal


def test_a_config_nested_beyond_all_measure_is_refused_or_compared(copy: CheckpointEditor) -> None:
    (copy.path / "config.json").write_text('{"a": ' * 900 + "1" + "}" * 900)
    other = Path(shutil.copytree(copy.path, copy.path.parent / "other"))
    (other / "config.json").write_text('{"a": ' * 900 + "2" + "}" * 900)
    try:
        found = diff(copy.path, other)
    except ContentError as error:
        assert "nested too deeply" in str(error)
    else:
        assert not found.equal


def test_errors() -> None:
    with pytest.raises(UsageError, match="no such directory"):
        diff(QWEN, DATA / "nothing")
    with pytest.raises(NotACheckpointError, match="a directory of 4 checkpoints"):
        diff(QWEN, DATA)


def test_many_kinds_are_bounded_in_text_and_whole_in_json(
    copy: CheckpointEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.rename({n: f"{n}.x{i}" for i, n in enumerate(copy.tensors())})
    assert run(["diff", str(QWEN_NVFP4), str(copy.path)]) == 1
    text = capsys.readouterr().out
    assert f"and {213 - LINES} more groups; --format json has all" in text
    assert run(["diff", str(QWEN_NVFP4), str(copy.path), "--format", "json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert not value["equal"]
    assert sum(c["count"] for c in value["changes"] if c["kind"] == "only B") == 213


def test_hostile_names_are_bounded_and_escaped(copy: CheckpointEditor) -> None:
    names = ("a.*.b", "a.1.b", f"a.{'9' * 6000}.b", "x\x1b[31m.2\n.weight", "a..1")
    for name in names:
        copy.add(name, np.zeros(1, np.uint8))
    text = diff_text(diff(QWEN_NVFP4, copy.path))
    assert all(c == "\n" or c.isprintable() for c in text)
    assert max(map(len, text.splitlines())) < 600
    assert "\\x1b[31m" in text


def test_ranges_of_names() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in (3, 4, 5, 9) for j in range(8)]
    found = gathered([*names, "model.norm.weight"])
    assert [(n.label, n.count, n.spanned) for n in found] == [
        ("model.layers.{3-5,9}.mlp.experts.{0-7}.w1", 32, 32),
        ("model.norm.weight", 1, 1),
    ]
    assert gathered(f"a.{i}.b" for i in range(0, 40, 2))[0].label == "a.{0,2,4,6,8,10,…}.b"


def test_a_release_is_a_page(tmp_path: Path) -> None:
    """The published MiniMax-M3 to its layer 9 against the mixed export of it: 11,000 tensors,
    headers only.
    """
    later = re.compile(r"language_model\.model\.layers\.[1-9]\d\.")
    vendor = [r for r in sparse.rows() if not later.match(r[0])]
    mixed = sparse.mixed(vendor)
    config = sparse.m3_config()
    a = sparse.write(tmp_path / "vendor", vendor, config | {QC: sparse.vendor_quantization()}, 3)
    b = sparse.write(
        tmp_path / "mixed", mixed, config | {QC: sparse.release_quantization(mixed)}, 7
    )
    found = diff(a, b)
    experts = "language_model.model.layers.{3-9}.block_sparse_moe.experts.{0-127}"
    assert {c.names.label: c.names.count for c in found.of("dtype and shape")} == {
        f"{experts}.{w}.weight": 7 * 128 for w in ("w1", "w2", "w3")
    }
    assert sum(c.names.count for c in found.of("only A")) == 3 * 7 * 128
    assert sum(c.names.count for c in found.of("only B")) == 9 * 7 * 128
    assert found.of("dtype", "shape") == ()
    text = diff_text(found)
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) < 300
    assert "  routed_expert  2,688 MXFP8 → 2,688 NVFP4" in text
