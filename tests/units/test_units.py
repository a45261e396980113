# SPDX-License-Identifier: Apache-2.0
"""Export, merge and check in units: the same bytes and the same report, whoever does them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import exporter
from exporter.exporting import plan_export, plan_merge_of
from exporter.out import work_folder
from exporter.units import PlanCall, WriteJob
from exporter.writing import WriteOptions
from tests.kill.run import files_of
from tests.paths import ROOT
from tests.units.runners import RAY, RUNNERS, SHARES, one_after_the_other, result_of
from verifier import check, ray_runner
from verifier.checkpoint import open_checkpoint
from verifier.cli import run as ckptgate
from verifier.cli.units import CheckJob, ScoreJob
from verifier.errors import CkptgateError, UsageError
from verifier.findings import Report
from verifier.gate import score_run
from verifier.gate.corpora import load_corpus
from verifier.selftest import CORRUPTORS
from verifier.units import share_of

SOURCE = ROOT / "goldens" / "qwen3-moe-tiny" / "bf16"
CORPUS = SOURCE.parent / "corpus.jsonl"
SHARD = 200_000
EXPORT = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
Run = Callable[[Any], list[Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export on one machine."""
    out = tmp_path_factory.mktemp("whole") / "out"
    exporter.export(SOURCE, out, **EXPORT, shard_bytes=SHARD)
    return out


@pytest.fixture(scope="module")
def broken(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the export, with a defect that a payload check finds."""
    folder = tmp_path_factory.mktemp("broken") / "out"
    shutil.copytree(whole, folder)
    next(c for c in CORRUPTORS if c.rule == "QC501").apply(folder)
    return folder


def export_job(out: Path, source: Path = SOURCE) -> WriteJob:
    call = PlanCall(plan_export, (("source", str(source)), *EXPORT.items()))
    return WriteJob(call, out, WriteOptions(shard_bytes=SHARD))


def check_job(path: Path, place: str, of: int = 3) -> CheckJob:
    options = {"base": str(SOURCE), "depth": "payload"}
    job = CheckJob.for_runner(SHARES[0], str(path), options, place)
    return replace(job, of=of)


def timeless(report: Report) -> Report:
    return replace(report, summary=replace(report.summary, seconds=None))


@pytest.mark.parametrize("run", RUNNERS)
def test_an_export_in_units_has_the_bytes_of_one_machine(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    job = export_job(tmp_path / "out")
    assert len(job.units()) > len(SHARES)
    assert result_of(run, job).name == "out"
    assert files_of(job.out) == files_of(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("run", RUNNERS)
def test_a_merge_in_units_has_the_bytes_of_one_machine(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    exporter.merge(whole, tmp_path / "one" / "out", onto=SOURCE, shard_bytes=SHARD)
    options = (("experts", str(whole)), ("onto", str(SOURCE)))
    job = WriteJob(
        PlanCall(plan_merge_of, options), tmp_path / "out", WriteOptions(shard_bytes=SHARD)
    )
    assert result_of(run, job).kind == "merge"
    assert files_of(job.out) == files_of(tmp_path / "one" / "out")


@pytest.mark.parametrize("run", RUNNERS)
def test_a_check_in_units_gives_the_report_of_one_machine(
    run: Run, broken: Path, tmp_path: Path
) -> None:
    report = result_of(run, check_job(broken, str(tmp_path)))
    alone = check(broken, base=str(SOURCE), depth="payload", workers=1)
    assert "QC501" in {f.rule for f in report.findings}
    assert timeless(report) == timeless(alone)


@pytest.mark.parametrize("run", [one_after_the_other, RAY])
def test_a_score_in_units_is_that_of_one_machine(run: Run, tmp_path: Path) -> None:
    checkpoint, corpus = open_checkpoint(SOURCE), load_corpus(str(CORPUS)).head(3)
    options = {"journal": tmp_path / "run.part", "workers": 1, "seq_len": 32, "batch": 1}
    scored = result_of(run, ScoreJob(str(SOURCE), corpus, options, 2))
    whole = score_run(checkpoint, corpus, workers=1, seq_len=32, batch=1)
    assert whole is not None
    assert all(np.array_equal(scored.arrays[k], v) for k, v in whole.arrays.items())
    header = scored.header.model_copy(update={"seconds": whole.header.seconds})
    assert header == whole.header


def test_parts_of_a_score_are_those_of_the_run_before(tmp_path: Path) -> None:
    class Nodes:
        of, workers, slots, here = None, 1, 5, False

    corpus, part = load_corpus(str(CORPUS)), tmp_path / "run.part"
    of = ScoreJob.for_runner(Nodes(), str(SOURCE), corpus, {"journal": part}, print).of
    (tmp_path / "run.part.0-of-7").touch()
    again = ScoreJob.for_runner(Nodes(), str(SOURCE), corpus, {"journal": part}, print).of
    assert (of, again) == (5, 7)


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_runner, "find_spec", lambda _name: None)
    assert ckptgate(["check", str(SOURCE), "--records", "R", "--ray"]) == 2
    assert "--ray needs the extra 'ray': pip install 'ckptgate[ray]'" in capsys.readouterr().err


def test_records_in_an_object_store(broken: Path) -> None:
    job = check_job(broken, "memory://records")
    assert [share(job) is None for share in SHARES] == [True, True, False]
    assert len(fsspec.filesystem("memory").glob(f"{job.place}/*.json")) == len(SHARES)


def test_a_lost_shard_is_written_again_and_no_other(whole: Path, tmp_path: Path) -> None:
    job = export_job(tmp_path / "out")
    assert SHARES[0](job) is None
    assert SHARES[1](job) is None
    folder = work_folder(job.out)
    lost = job.units()[0]
    (folder / "records" / f"{lost}.json").unlink()
    before = {p.name: p.stat().st_ino for p in (folder / "checkpoint").iterdir()}
    assert SHARES[2](job) is None
    assert SHARES[0](job) is not None
    after = {p.name: p.stat().st_ino for p in job.out.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {lost}
    assert files_of(job.out) == files_of(whole)


def test_one_machine_completes_what_shares_began(whole: Path, tmp_path: Path) -> None:
    job = export_job(tmp_path / "out")
    assert SHARES[0](job) is None
    exporter.export(SOURCE, job.out, **EXPORT, shard_bytes=SHARD)
    assert files_of(job.out) == files_of(whole)


def test_shards_of_a_source_that_changed_are_written_again(whole: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    job = export_job(tmp_path / "out", source)
    assert SHARES[0](job) is None
    for shard in source.glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    exporter.units._plan_of.cache_clear()
    assert SHARES[1](job) is None
    assert SHARES[2](job) is None
    records = {p.stem for p in (work_folder(job.out) / "records").iterdir()}
    assert records.isdisjoint(job.units()[0::3])


def test_a_share_that_comes_late_does_not_touch_the_result(whole: Path, tmp_path: Path) -> None:
    job = export_job(tmp_path / "out")
    shutil.copytree(whole, job.out)
    with pytest.raises(UsageError, match="already exists"):
        SHARES[0](job)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "1/10001"])
def test_no_such_share(text: str) -> None:
    with pytest.raises(UsageError, match="write k/n, such as 2/8"):
        share_of(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "A", "--units", "1/2"], "--units and --ray need --records"),
        (["check", "A", "B", "--units", "1/2", "--records", "R"], "take one PATH"),
        (["export", "A", "B", "--recipe", "R", "--overwrite", "--units", "1/2"], "not --overwrite"),
        (["merge", "A", "B", "--onto", "C", "--units", "1/2", "--ray"], "exclude each other"),
        (["check", "--ray", "A"], "'A' is not HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ckptgate(arguments) == 2
    assert message in capsys.readouterr().err


def test_records_that_cannot_be_opened(broken: Path) -> None:
    with pytest.raises(CkptgateError, match="nosuch"):
        SHARES[0](check_job(broken, "nosuch://records"))


def test_the_slurm_example(whole: Path, tmp_path: Path) -> None:
    def task(number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        return subprocess.run(
            ["bash", str(ROOT / "examples" / "slurm.sh"), *arguments],
            env={**os.environ, "PATH": path, **slurm},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    report = tmp_path / "report.json"
    arguments = [str(whole), "--depth", "payload", "--records", str(tmp_path), "-o", str(report)]
    first = task(1, "check", *arguments)
    assert (first.returncode, report.exists()) == (0, False), first.stderr
    second = task(2, "check", *arguments)
    assert (second.returncode, report.exists()) == (0, True), second.stderr
