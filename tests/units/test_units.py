# SPDX-License-Identifier: Apache-2.0
"""Export, merge and check in units: the same bytes and the same report, whoever does them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

import exporter
from exporter.out import work_folder
from tests.kill.run import files_of
from tests.paths import ROOT
from tests.units.cases import (
    CORPUS,
    EXPORT,
    SCORED,
    SHARD,
    SOURCE,
    WITHOUT_MODEL,
    Alone,
    Case,
    check_job,
    export_job,
    merge_job,
    recorded,
)
from tests.units.runners import RAY, RUNNERS, SHARES, one_after_the_other, result_of
from verifier import ray_runner
from verifier.checkpoint import open_checkpoint
from verifier.cli import run as ckptgate
from verifier.cli.units import CheckJob, ScoreJob
from verifier.errors import CkptgateError, UsageError
from verifier.gate.corpora import load_corpus
from verifier.manifest import MANIFEST
from verifier.run import report_of
from verifier.units import Share, share_of

COMPARING = ("QC515", "QC605")
"""The rules that compare weights with the base, quantized or not."""
Run = Callable[[Any], list[Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))


@pytest.fixture
def whole(alone: Alone) -> Path:
    return alone.inputs.whole


@pytest.fixture
def broken(alone: Alone) -> Path:
    return alone.inputs.broken


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("case", WITHOUT_MODEL, ids=str)
def test_units_make_what_one_machine_makes(
    case: Case, run: Run, alone: Alone, tmp_path: Path
) -> None:
    job = case.job(alone.inputs, tmp_path)
    assert len(job.units()) > len(SHARES)
    assert case.outcome(tmp_path, result_of(run, job)) == alone.outcome(case)


@pytest.mark.parametrize("run", [one_after_the_other, RAY])
def test_a_score_in_units_is_that_of_one_machine(run: Run, alone: Alone, tmp_path: Path) -> None:
    job = replace(SCORED.job(alone.inputs, tmp_path), of=2)
    assert SCORED.outcome(tmp_path, result_of(run, job)) == alone.outcome(SCORED)


@pytest.mark.parametrize("shards", ["several", "one"])
def test_every_unit_of_a_check_has_modules(shards: str, alone: Alone, tmp_path: Path) -> None:
    path = alone.inputs.broken if shards == "several" else alone.inputs.one_shard
    job = check_job(path, str(tmp_path))
    assert (len(open_checkpoint(path).shards) == 1) == (shards == "one")
    one_after_the_other(job)
    parts = [report_of(json.loads(file.read_bytes())) for file in Path(job.place).iterdir()]
    checked = [sum(c.checked for c in p.coverage if c.rule in COMPARING) for p in parts]
    assert len(checked) == job.of
    assert all(checked)


class Nodes:
    """A runner with five slots."""

    of, workers, slots, here = None, 1, 5, False


def test_parts_of_a_check_are_those_of_the_run_before(broken: Path, tmp_path: Path) -> None:
    def job() -> CheckJob:
        return CheckJob.for_runner(Nodes(), str(broken), {"depth": "payload"}, str(tmp_path))

    shards = len(open_checkpoint(broken).shards)
    assert job().of == max(shards, Nodes.slots)
    begun = replace(job(), of=7)
    begun.do(begun.units()[:1])
    assert job().of == 7


def test_parts_of_a_score_are_those_of_the_run_before(tmp_path: Path) -> None:
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
    assert len(fsspec.filesystem("memory").glob(f"{job.place}/*.json")) == job.of


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
    assert recorded(job.out).isdisjoint(job.units()[0::3])


def test_a_share_that_comes_late_does_not_touch_the_result(whole: Path, tmp_path: Path) -> None:
    job = export_job(tmp_path / "out")
    shutil.copytree(whole, job.out)
    assert SHARES[0](job) is not None
    assert Share(10_000, 10_000)(job) is None  # it has no unit
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files_of(job.out) == files_of(whole)


def test_an_out_of_a_source_that_changed_is_not_the_result(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    job = export_job(tmp_path / "out", source)
    assert result_of(one_after_the_other, job) is not None
    next(source.glob("*.safetensors")).touch()
    with pytest.raises(UsageError, match="already exists"):
        SHARES[0](job)


def test_parts_that_begin_after_the_last_one_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(SOURCE), str(out), "--recipe", EXPORT["recipe"], "--no-check"]
    arguments += ["--input-scale", EXPORT["input_scale"]]
    outputs = []
    for part in ("1/3", "2/3", "1/3"):  # there is one shard
        assert ckptgate([*arguments, "--units", part]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs == [outputs[0], "", outputs[0]]
    assert outputs[0].startswith(f"wrote {out}: ")
    assert ckptgate([*arguments, "--units", "1/3", "--layers", "0"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_unit_that_was_lost_after_the_last_one_is_done(alone: Alone, tmp_path: Path) -> None:
    job = export_job(tmp_path / "out")
    made = result_of(one_after_the_other, job)
    assert SHARES[0](job) == made
    with pytest.raises(UsageError, match="already exists"):
        SHARES[0](merge_job(alone.inputs, tmp_path))
    assert files_of(job.out) == files_of(alone.inputs.whole)
    (job.out / MANIFEST).write_text("{}")
    with pytest.raises(UsageError, match="already exists"):
        SHARES[0](job)


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
        (["export", "A", "B", "--recipe", "R", "--shard-size", "2"], "'2': write a size above 0"),
        (["export", "A", "B", "--recipe", "R", "--shard-size", "0MB"], "write a size above 0"),
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


def test_more_parts_than_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def export(out: str, *more: str) -> str:
        arguments = ["export", str(SOURCE), str(tmp_path / out), "--recipe", EXPORT["recipe"]]
        arguments += ["--input-scale", EXPORT["input_scale"], "--units", "2/3", *more]
        assert ckptgate(arguments) == 0
        return capsys.readouterr().err

    assert "1 shard for 3 parts: a smaller --shard-size gives work to all" in export("one")
    assert "shards for" not in export("several", "--shard-size", "0.2MB")
    written = export_job(tmp_path / "several").units()[1::3]
    assert recorded(tmp_path / "several") == set(written)


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
