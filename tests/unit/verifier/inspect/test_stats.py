# SPDX-License-Identifier: Apache-2.0
"""The numbers of a checkpoint against counts made by hand from its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import NotACheckpointError, UsageError
from verifier.inspect.render import stats_text
from verifier.inspect.stats import bins, shares, stats
from verifier.selftest.editor import CheckpointEditor

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, LLAMA_MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"


@pytest.fixture
def copy(tmp_path: Path) -> CheckpointEditor:
    return CheckpointEditor(Path(shutil.copytree(QWEN_NVFP4, tmp_path / "copy")))


def test_a_base_has_sixteen_bits() -> None:
    found = stats(QWEN)
    assert {r.format for r in found.rows} == {"BF16"}
    assert {r.bits for r in found.rows} == {16.0}
    assert found.total.parameters == sum(
        int(np.prod(t.shape)) for t in CheckpointEditor(QWEN).tensors().values()
    )
    assert found.total.weight_bytes == found.nbytes


@pytest.mark.parametrize(
    ("base", "candidate"), [(QWEN, QWEN_NVFP4), (LLAMA, LLAMA_MXFP8)], ids=["nvfp4", "mxfp8"]
)
def test_the_parameters_of_a_quantized_copy_are_those_of_its_base(
    base: Path, candidate: Path
) -> None:
    """ModelOpt's bytes against ModelOpt's source: packing and scales change no count."""
    plain, packed = stats(base), stats(candidate)
    for row in packed.rows:
        assert row.parameters == sum(r.parameters or 0 for r in plain.rows if r.role == row.role)
    assert packed.total.parameters == plain.total.parameters
    assert (
        packed.total.weight_bytes + packed.total.scale_bytes + packed.total.other_bytes
        == packed.nbytes
    )


def test_bits_are_real_ones() -> None:
    """NVFP4: 4 + 8/16 bits and two float32 a tensor; MXFP8: 8 + 8/32."""
    experts = next(r for r in stats(QWEN_NVFP4).rows if r.role == "routed_expert")
    assert (experts.format, experts.modules) == ("NVFP4", 48)
    assert experts.bits == pytest.approx(4.5 + 48 * 2 * 32 / (48 * 64 * 128), rel=1e-12)
    assert {r.bits for r in stats(LLAMA_MXFP8).rows if r.format == "MXFP8"} == {8.25}


def test_codes_are_counted_as_they_stand(copy: CheckpointEditor) -> None:
    raw = b"".join(copy.read(n) for n in copy.tensors() if n.endswith(".weight_scale"))
    found = stats(copy.path, depth="payload")
    assert [(c.format, c.leaf, c.kind) for c in found.codes] == [("NVFP4", "weight_scale", "E4M3")]
    assert (
        found.codes[0].counts.tolist()
        == np.bincount(np.frombuffer(raw, np.uint8), minlength=256).tolist()
    )
    name = "model.layers.0.mlp.experts.3.up_proj.weight_scale"
    copy.overwrite(name, 7, bytes([0x00, 0x01, 0x01, 0x7E, 0x7F, 0x81]))
    after = shares(stats(copy.path, depth="payload").codes[0].counts, "E4M3")
    before = shares(found.codes[0].counts, "E4M3")
    assert {k: after[k] - before[k] for k in after if k != "max"} == {
        "total": 0,
        "invalid": 1,
        "zero": 1,
        "negative": 1,
        "floor": 2,
    }
    text = stats_text(stats(copy.path, depth="payload"))
    assert "at the floor 2^-9" in text
    assert "NaN" in text


def test_power_of_two_codes() -> None:
    found = stats(LLAMA_MXFP8, depth="payload")
    folder = CheckpointEditor(LLAMA_MXFP8)
    raw = b"".join(folder.read(n) for n in folder.tensors() if n.endswith(".weight_scale"))
    assert found.codes[0].kind == "E8M0"
    assert (
        found.codes[0].counts.tolist()
        == np.bincount(np.frombuffer(raw, np.uint8), minlength=256).tolist()
    )
    assert sum(n for _, n in bins(found.codes[0].counts, "E8M0")) == len(raw)


@pytest.mark.parametrize("kind", ["E4M3", "E8M0"])
def test_every_code_falls_into_the_bin_of_its_value(kind: str) -> None:
    dtype = ml_dtypes.float8_e4m3fn if kind == "E4M3" else ml_dtypes.float8_e8m0fnu
    for code in range(256):
        counts = np.zeros(256, np.int64)
        counts[code] = 1
        value = abs(float(np.uint8(code).view(dtype)))
        label = (
            "NaN"
            if np.isnan(value)
            else "0"
            if value == 0
            else f"2^{int(np.floor(np.log2(value)))}"
        )
        assert bins(counts, kind) == [(label, 1)]  # type: ignore[arg-type]


def test_bins_are_bounded_and_lose_nothing() -> None:
    found = bins(np.arange(256), "E8M0")
    assert len(found) <= 33
    assert sum(n for _, n in found) == 255 * 128


def test_floats_name_their_extremes(copy: CheckpointEditor) -> None:
    leaf = "weight_scale_2"
    values = {n: float(copy.array(n)) for n in copy.tensors() if n.endswith(leaf)}
    found = next(f for f in stats(copy.path, depth="payload").floats if f.leaf == leaf)
    assert (found.low, found.high) == (min(values.values()), max(values.values()))
    assert values[found.low_at] == found.low
    assert values[found.high_at] == found.high
    assert (found.count, found.distinct) == (48, len(set(values.values())))
    for i, value in enumerate((0.0, np.nan, np.inf, -1.0)):
        copy.overwrite(
            f"model.layers.0.mlp.experts.{i}.up_proj.{leaf}", 0, np.float32(value).tobytes()
        )
    found = next(f for f in stats(copy.path, depth="payload").floats if f.leaf == leaf)
    assert (found.zero, found.invalid, found.negative, found.low) == (1, 2, 1, -1.0)


def test_the_header_alone_reads_no_scale() -> None:
    found = stats(QWEN_NVFP4)
    assert found.codes == found.floats == ()
    assert "--depth payload also shows the values of scales" in stats_text(found)


def test_an_undetermined_format_has_no_bits(copy: CheckpointEditor) -> None:
    copy.drop(["model.layers.0.mlp.experts.0.up_proj.weight_scale"])
    copy.add("blob", np.zeros((2, 3, 4), np.uint8))
    found = stats(copy.path, depth="payload")
    assert ("other", "undetermined") in {
        (r.role, r.format) for r in found.rows if r.parameters is None
    }
    assert found.total.bits is None
    assert "unknown" in stats_text(found)


def test_the_command(copy: CheckpointEditor, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stats", str(copy.path), "--depth", "payload", "--format", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["total"]["bits_per_parameter"] == stats(copy.path).total.bits
    assert (
        sum(sum(r["counts"]) for c in value["codes"] for r in c["roles"].values())
        == value["codes"][0]["total"]
    )
    shard = copy.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert run(["stats", str(copy.path)]) == 1
    assert (
        "cannot be read completely: model.safetensors: ends 1,000 bytes early"
        in capsys.readouterr().out
    )


def test_hostile_names_are_escaped(copy: CheckpointEditor) -> None:
    copy.add("x\x1b[31m.weight", np.ones((2, 16), ml_dtypes.float8_e4m3fn))
    copy.add("x\x1b[31m.weight_scale", np.float32([1, 2]))
    text = stats_text(stats(copy.path, depth="payload"))
    assert all(c == "\n" or c.isprintable() for c in text)
    assert "x\\x1b[31m.weight_scale" in text


def test_errors() -> None:
    with pytest.raises(UsageError, match="unknown depth"):
        stats(QWEN, depth="load")
    with pytest.raises(NotACheckpointError, match="a directory of 4 checkpoints"):
        stats(DATA)
