# SPDX-License-Identifier: Apache-2.0
"""Every kind of job that is divided into units, and what one machine makes of the same."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import exporter
from exporter.exporting import plan_export, plan_merge_of
from exporter.out import work_folder
from exporter.units import PlanCall, WriteJob
from exporter.writing import WriteOptions
from tests.kill.run import files_of
from tests.paths import ROOT
from tests.units.runners import SHARES
from verifier import check
from verifier.checkpoint import open_checkpoint
from verifier.cli.units import CheckJob, ScoreJob
from verifier.findings import Report
from verifier.gate import score_run
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.run_file import Run
from verifier.selftest import CORRUPTORS

SOURCE = ROOT / "goldens" / "qwen3-moe-tiny" / "bf16"
CORPUS = SOURCE.parent / "corpus.jsonl"
SHARD = 200_000
EXPORT = {"recipe": "nvfp4_experts_only", "input_scale": "one"}
CHECK = {"base": str(SOURCE), "depth": "payload"}
SCORE = {"workers": 1, "seq_len": 32, "batch": 1}
PARTS = 5
SCORE_PARTS = 3  # each loads torch in a process of its own


@dataclass(frozen=True)
class Inputs:
    """What jobs read: an export in shards, and broken ones in shards and in one."""

    whole: Path
    broken: Path
    one_shard: Path


def inputs_in(folder: Path) -> Inputs:
    """Write what jobs read."""
    inputs = Inputs(*(folder / name for name in ("out", "broken", "one")))
    for out, shard_bytes in ((inputs.whole, SHARD), (inputs.one_shard, None)):
        exporter.export(SOURCE, out, **EXPORT, shard_bytes=shard_bytes)
    shutil.copytree(inputs.whole, inputs.broken)
    for out in (inputs.broken, inputs.one_shard):
        next(c for c in CORRUPTORS if c.rule == "QC501").apply(out)
    return inputs


@dataclass(frozen=True)
class Case:
    """A kind of job.

    Attributes:
        name: of the case.
        job: returns one of several units, which may write into a folder.
        alone: does the same on one machine.
        outcome: what is compared: of the folder, and what the job or the machine returned.
    """

    name: str
    job: Callable[[Inputs, Path], Any]
    alone: Callable[[Inputs, Path], Any]
    outcome: Callable[[Path, Any], Any]

    def __str__(self) -> str:
        return self.name


def export_job(out: Path, source: Path = SOURCE) -> WriteJob:
    """Return an export."""
    call = PlanCall(plan_export, (("source", str(source)), *EXPORT.items()))
    return WriteJob(call, out, WriteOptions(shard_bytes=SHARD, workers=1))


def recorded(out: Path) -> set[str]:
    """Return the shards of an output that is not complete that have a completion record."""
    return {p.stem for p in (work_folder(out) / "records").glob("*.json")}


def merge_job(inputs: Inputs, folder: Path) -> WriteJob:
    """Return a merge."""
    options = (("experts", str(inputs.whole)), ("onto", str(SOURCE)))
    write = WriteOptions(shard_bytes=SHARD, workers=1)
    return WriteJob(PlanCall(plan_merge_of, options), folder / "out", write)


def _merge(inputs: Inputs, folder: Path) -> Any:
    return exporter.merge(inputs.whole, folder / "out", onto=SOURCE, shard_bytes=SHARD)


def check_job(path: Path, place: str, of: int = PARTS) -> CheckJob:
    """Return a check of a checkpoint."""
    return replace(CheckJob.for_runner(SHARES[0], str(path), CHECK, place), of=of)


def _checked(_folder: Path, report: Report) -> Report:
    assert "QC501" in {f.rule for f in report.findings}
    return replace(report, summary=replace(report.summary, seconds=None))


def _corpus() -> Corpus:
    return load_corpus(str(CORPUS)).head(SCORE_PARTS)


def _score_job(_inputs: Inputs, folder: Path) -> ScoreJob:
    options = {"journal": folder / "run.part", **SCORE}
    return ScoreJob(str(SOURCE), _corpus(), options, SCORE_PARTS)


def _score(_inputs: Inputs, _folder: Path) -> Any:
    return score_run(open_checkpoint(SOURCE), _corpus(), **SCORE)


def _scored(_folder: Path, run: Run) -> dict[str, Any]:
    arrays = {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in run.arrays.items()}
    return {**arrays, "header": run.header.model_copy(update={"seconds": 0.0})}


WITHOUT_MODEL = (
    Case(
        "export",
        lambda _inputs, folder: export_job(folder / "out"),
        lambda _inputs, folder: exporter.export(
            SOURCE, folder / "out", **EXPORT, shard_bytes=SHARD
        ),
        lambda folder, _manifest: files_of(folder),
    ),
    Case("merge", merge_job, _merge, lambda folder, _manifest: files_of(folder)),
    Case(
        "check",
        lambda inputs, folder: check_job(inputs.broken, str(folder)),
        lambda inputs, _folder: check(inputs.broken, **CHECK, workers=1),
        _checked,
    ),
    Case(
        "check of one shard",
        lambda inputs, folder: check_job(inputs.one_shard, str(folder)),
        lambda inputs, _folder: check(inputs.one_shard, **CHECK, workers=1),
        _checked,
    ),
)
SCORED = Case("score", _score_job, _score, _scored)
CASES = (*WITHOUT_MODEL, SCORED)


class Alone:
    """What one machine makes of each case, made once."""

    def __init__(self, folder: Path) -> None:
        self.inputs, self._folder = inputs_in(folder), folder
        self._outcomes: dict[str, Any] = {}

    def outcome(self, case: Case) -> Any:
        """Return what is compared."""
        if case.name not in self._outcomes:
            folder = self._folder / f"alone {case.name}"
            folder.mkdir()
            self._outcomes[case.name] = case.outcome(folder, case.alone(self.inputs, folder))
        return self._outcomes[case.name]
