# SPDX-License-Identifier: Apache-2.0
"""Reading by shard and in pieces: the same report whatever the workers, each tensor read once,
memory bounded.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import verifier
from tests.paths import TESTS
from verifier import processes
from verifier.checkpoint import Bytes
from verifier.checkpoint.source import LocalSource
from verifier.errors import ContainerError, MachineError, UsageError
from verifier.findings import Report, rules_of
from verifier.run import schedule
from verifier.selftest.editor import CheckpointEditor, RawShard, read_shard, write_shard

DATA = TESTS / "data" / "modelopt"
BASE, NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
Entry = tuple[str, tuple[int, ...], bytes]


def reshard(source: Path, target: Path, count: int) -> Path:
    """Copy a checkpoint of one file into several, tensors dealt out in turn, so that modules lie
    across files.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copyfile(file, target / file.name)
    (file,) = source.glob("*.safetensors")
    entries = read_shard(file).entries
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        mine = {n: e for j, (n, e) in enumerate(entries.items()) if j % count == i}
        write_shard(target / name, RawShard({"format": "pt"}, mine))
        weight_map |= dict.fromkeys(mine, name)
    total = sum(len(data) for _, _, data in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def damage(path: Path) -> Path:
    """Break values of several kinds in several places."""
    folder = CheckpointEditor(path)
    experts = sorted(
        m for m, p in folder.modules().items() if ".experts." in m and "weight_scale_2" in p
    )
    for i, module in enumerate(experts):
        scale = folder.array(f"{module}.weight_scale").copy().view(np.uint8)
        if i % 5 == 0:
            scale[i % scale.shape[0], 1] = 0
        if i % 7 == 0:
            scale[-1, -1] = 0x7F
        if i % 11 == 0:
            scale[0, 0] = 0x81
        folder.store(f"{module}.weight_scale", scale.view(ml_dtypes.float8_e4m3fn))
        if i % 13 == 0:
            folder.overwrite(f"{module}.input_scale", 0, np.float32(0).tobytes())
        if i % 6 == 0:
            codes = folder.array(f"{module}.weight")
            folder.store(f"{module}.weight", np.roll(codes, 5, axis=0))
    norms = sorted(n for n in folder.tensors() if n.endswith("layernorm.weight"))
    for name in norms[::2]:
        folder.overwrite(name, 3, b"\x80\x7f")
    folder.overwrite(norms[1], 0, b"\x11")
    return path


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy in five files with defects that every payload rule names."""
    return damage(reshard(NVFP4, tmp_path_factory.mktemp("damaged") / "ckpt", 5))


def same(a: Report, b: Report) -> bool:
    """Whether two reports say the same; how long it took is not a part of that."""

    def reported(r: Report) -> Report:
        return replace(r, summary=replace(r.summary, seconds=None))

    return reported(a) == reported(b)


@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "base"])
def test_the_report_does_not_depend_on_threads(damaged: Path, base: Path | None) -> None:
    one = verifier.check(damaged, base=base, depth="payload", workers=1)
    assert {"QC501", "QC502", "QC503", "QC508"} <= rules_of(one.findings)
    assert base is None or {"QC515", "QC605"} <= rules_of(one.findings)
    for workers in (2, 7):
        assert same(one, verifier.check(damaged, base=base, depth="payload", workers=workers))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "base"])
def test_nor_on_processes(
    damaged: Path, base: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = verifier.check(damaged, base=base, depth="payload", workers=1)
    copied = []

    def counted(
        work: Callable[..., object],
        order: list[int],
        workers: int,
        on_part: Callable[[int, object], None],
    ) -> Iterator[tuple[int, object]]:
        copied.append((len(order), workers))
        return processes.forked(work, order, workers, on_part)

    monkeypatch.setattr(schedule, "forked", counted)
    monkeypatch.setattr(
        schedule, "can_fork", lambda: True
    )  # the test runner has a thread of its own
    assert same(one, verifier.check(damaged, base=base, depth="payload", workers=2))
    assert not copied  # too small
    monkeypatch.setattr(schedule, "WORTH_COPIES", 1)
    for workers in (2, 7):
        assert same(one, verifier.check(damaged, base=base, depth="payload", workers=workers))
    assert copied == [(5, 2), (5, 7)]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "base"])
def test_nor_on_the_division_of_shards(
    damaged: Path, base: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verifier.check(damaged, base=base, depth="payload", workers=1)
    units: list[int] = []
    by_copies = schedule._by_copies

    def counted(ctx, run, tasks, workers, amounts):  # type: ignore[no-untyped-def]
        units.append(len(tasks))
        return by_copies(ctx, run, tasks, workers, amounts)

    monkeypatch.setattr(schedule, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(schedule, "WORTH_COPIES", 1)
    monkeypatch.setattr(schedule, "can_fork", lambda: True)
    monkeypatch.setattr(schedule, "_by_copies", counted)
    for workers in (1, 2, 3):
        assert same(whole, verifier.check(damaged, base=base, depth="payload", workers=workers))
    assert len(units) == 2 and units[0] > 15  # five files


def test_the_report_does_not_depend_on_the_number_of_files(damaged: Path, tmp_path: Path) -> None:
    whole = damage(Path(shutil.copytree(NVFP4, tmp_path / "whole")))
    one, five = (verifier.check(p, base=BASE, depth="payload") for p in (whole, damaged))
    assert one.verdict == five.verdict
    tell = Counter(
        (f.rule, f.severity, f.message, f.count, f.of) for f in one.findings if f.rule > "QC5"
    )
    assert tell == Counter(
        (f.rule, f.severity, f.message, f.count, f.of) for f in five.findings if f.rule > "QC5"
    )
    counts = {c.rule: (c.checked, c.of) for c in five.coverage if c.rule > "QC5"}
    assert counts == {c.rule: (c.checked, c.of) for c in one.coverage if c.rule > "QC5"}


def test_more_files_than_are_kept_open(tmp_path: Path) -> None:
    many = reshard(NVFP4, tmp_path / "many", 150)
    damage(many)
    assert same(*(verifier.check(many, base=BASE, depth="payload", workers=w) for w in (1, 8)))


@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "base"])
def test_tensors_are_read_as_often_as_there_is_reason(
    base: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, int, int]] = Counter()
    read_into = LocalSource.read_into

    def counted(self: LocalSource, name: str, offset: int, out: Bytes) -> None:
        if self.path == NVFP4 and name.endswith(".safetensors"):
            reads[name, offset, out.size] += 1
        read_into(self, name, offset, out)

    monkeypatch.setattr(LocalSource, "read_into", counted)
    report = verifier.check(NVFP4, base=base, depth="payload")
    assert report.verdict == "passed"
    ckpt = verifier.open_checkpoint(NVFP4)
    values = {t: reads[t.file, t.offset, t.nbytes] for t in ckpt.tensors.values()}
    plain = {t.name: n for t, n in values.items() if t.dtype in ("BF16", "F32") and t.shape}
    assert set(plain.values()) <= ({1} if base is None else {1, 2})
    scalars = [n for t, n in values.items() if not t.shape]
    assert max(scalars) <= 3, "every rule that compares scalars may read them"
    scales = {t.name: n for t, n in values.items() if t.name.endswith("weight_scale")}
    # Once for what it holds, an expert's once to tell copies, and with a base once to decode.
    assert set(scales.values()) <= ({1, 2} if base is None else {2, 3})


def _big(folder: Path, scale: np.ndarray, norm: np.ndarray, codes: np.ndarray) -> Path:
    folder.mkdir()
    one = np.float32(1).tobytes()
    entries: dict[str, Entry] = {
        "a.mlp.experts.0.up_proj.weight": ("U8", codes.shape, codes.tobytes()),
        "a.mlp.experts.0.up_proj.weight_scale": ("F8_E4M3", scale.shape, scale.tobytes()),
        "a.mlp.experts.0.up_proj.weight_scale_2": ("F32", (), one),
        "a.mlp.experts.0.up_proj.input_scale": ("F32", (), one),
        "a.norm.weight": ("BF16", norm.shape, norm.tobytes()),
    }
    write_shard(folder / "model.safetensors", RawShard({}, entries))
    declared = {"quant_algo": "NVFP4", "quant_method": "modelopt"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return folder


def test_defects_beyond_the_first_piece_are_placed(tmp_path: Path) -> None:
    scale, codes = np.full((3072, 1024), 0x38, np.uint8), np.zeros((3072, 8192), np.uint8)
    norm = np.ones(2_000_000, ml_dtypes.bfloat16)
    clean = _big(tmp_path / "clean", scale, norm, codes)
    for place in ((2000, 7), (2000, 9), (3071, 1023)):
        scale[place] = 0
    codes[2000, 9 * 8 + 3] = 0x10
    codes[2000, 8 * 8] = codes[2000, 10 * 8] = 0x11  # the neighbours' codes
    scale[3000, 5], scale[3000, 6], scale[1, 1] = 0x7F, 0xFF, 0x90
    norm[[1_500_001, 1_999_999]] = np.nan, -np.inf
    report = verifier.check(
        _big(tmp_path / "bad", scale, norm, codes), merged_from=clean, depth="payload"
    )
    start = {t.name: t.offset for t in verifier.open_checkpoint(tmp_path / "bad").tensors.values()}
    at = start["a.mlp.experts.0.up_proj.weight_scale"]

    def reported(rule: str) -> list[tuple[str, int, int | None, int | None, int | None]]:
        return [
            (f.severity, f.count, f.where.row, f.where.block, f.where.byte)
            for f in report.by_rule(rule)
        ]

    assert reported("QC501") == [
        ("error", 1, 2000, 9, at + 2000 * 1024 + 9),
        ("warning", 2, 2000, 7, at + 2000 * 1024 + 7),
    ]
    assert reported("QC502") == [
        ("error", 2, 3000, 5, at + 3000 * 1024 + 5),
        ("error", 1, 1, 1, at + 1024 + 1),
    ]
    assert reported("QC508") == [("error", 2, 1_500_001, None, start["a.norm.weight"] + 3_000_002)]
    found = {f.where.tensor: f for f in report.by_rule("QC605")}
    assert found["a.norm.weight"].where.byte == start["a.norm.weight"] + 3_000_002
    first = np.float32(np.nan).astype(ml_dtypes.bfloat16).tobytes()[0]
    assert found["a.norm.weight"].observed == f"0x{first:02X}, 3 bytes differ"
    assert found["a.norm.weight"].expected == "0x80"


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [50_000, 6000], "data_offsets": [0, 600_000_000]}
    header = json.dumps({"e.embed_tokens.weight": entry})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header.encode())
            file.truncate(8 + len(header) + 600_000_000)

    def checked() -> Report:
        return verifier.check(tmp_path / "a", base=tmp_path / "b", depth="payload", workers=2)

    checked()  # imports what it needs
    tracemalloc.start()
    report = checked()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {c.rule for c in report.coverage if c.checked} >= {"QC508", "QC605"}
    assert peak < 30_000_000


@pytest.mark.parametrize(
    "error", [MachineError("disk"), ContainerError("cut off")], ids=["machine", "cut"]
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_read_is_no_pass(
    tmp_path: Path, error: Exception, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = reshard(NVFP4, tmp_path / "ckpt", 4)
    victim = next(
        t
        for t in verifier.open_checkpoint(path).tensors.values()
        if t.name.endswith("weight_scale")
    )
    read_into = LocalSource.read_into

    def failing(self: LocalSource, name: str, offset: int, out: Bytes) -> None:
        if (name, offset) == (victim.file, victim.offset):
            raise error
        read_into(self, name, offset, out)

    monkeypatch.setattr(LocalSource, "read_into", failing)
    if isinstance(error, MachineError):
        with pytest.raises(MachineError, match="disk"):
            verifier.check(path, depth="payload", workers=workers)
        return
    report = verifier.check(path, depth="payload", workers=workers)
    assert report.verdict == "inconclusive"
    assert report.summary.stopped["QC501"] == "cut off"
    assert [c.checked for c in report.coverage if c.rule == "QC501"] == [0]


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_odd_numbers_of_threads_are_refused(workers: int) -> None:
    with pytest.raises(UsageError, match="workers"):
        verifier.check(NVFP4, workers=workers)


def test_the_collector_is_left_as_it_was() -> None:
    before = gc.get_threshold()
    verifier.check(NVFP4)
    with pytest.raises(UsageError):
        verifier.check(NVFP4 / "absent")
    assert gc.get_threshold() == before
