# SPDX-License-Identifier: Apache-2.0
"""A suite on the golden: a sound export, a damaged one, what is kept, and the files it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import exporter
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.gate.jobs import Job, UnitScores
from verifier.gate.scorers.dispatch import score_by_model
from verifier.gate.suite import SuiteOptions, SuiteResult, run_suite
from verifier.history import load

BASE = ROOT / "goldens" / "qwen3-moe-tiny" / "bf16"
SCHEMA = ROOT / "verifier" / "report" / "schemas" / "suite-1.0.json"
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
metadata: {{version: 1.0}}
"""
CHOICE = """doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
WRITE = """generation_kwargs: {{until: [","], max_gen_toks: {limit}, do_sample: {sample}}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: ["(?s).+"]"""
SUITE = """name: release
entries:
  - {name: own, corpus: own.jsonl, documents: 8}
  - {name: choice, task: choice.yaml, max_increase: 30%, seq_len: 128}
  - {name: write, task: write.yaml, max_increase: 30%, seq_len: 128, documents: 16}
  - name: sampled
    task: sampled.yaml
    max_increase: 50%
    max_length_change: 0.9
    seq_len: 128
    documents: 8
    repeats: 2
"""
pytestmark = pytest.mark.xdist_group("gate")


def in_this_process(
    _work: object,
    jobs: Sequence[Job],
    _workers: int,
    on_part: Callable[[int, UnitScores], None],
    _died: str,
) -> list[dict[str, str]]:
    """Stand for `spawned`: a fresh process takes seconds to import torch."""
    return [
        score_by_model(job, lambda unit, number=number: on_part(number, unit))  # type: ignore[misc]
        for number, job in enumerate(jobs)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a sound export, a damaged one, the tasks and the suite."""
    folder = tmp_path_factory.mktemp("suite")
    sound, damaged = folder / "sound", folder / "damaged"
    exporter.export(BASE, sound, recipe="nvfp4_experts_only", input_scale="one")
    ckpt = open_checkpoint(shutil.copytree(sound, damaged))
    for name, tensor in ckpt.tensors.items():
        if name.endswith("down_proj.weight_scale_2"):
            with (damaged / tensor.file).open("r+b") as handle:
                value = np.frombuffer(ckpt.read(tensor).tobytes(), np.float32) * 4
                handle.seek(tensor.offset)
                handle.write(value.tobytes())
    nouns = (
        "sky game city film song war team king river church road ship book star year world house "
        "first sea wood town land"
    ).split()
    rows = [{"q": f"The {n} is", "choices": [" a", " zq xv"], "gold": 0, "t": ""} for n in nouns]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, target, more in (
        ("choice", "multiple_choice", "gold", CHOICE),
        ("write", "generate_until", "t", WRITE.format(limit=2, sample="false")),
        ("sampled", "generate_until", "t", WRITE.format(limit=12, sample="true, temperature: 1.0")),
    ):
        text = TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text)
    remote = f"task: remote\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n{CHOICE}"
    (folder / "remote.yaml").write_text(remote)
    (folder / "suite.yaml").write_text(SUITE)
    lines = (BASE.parent / "corpus.jsonl").read_text().splitlines()[1:]
    ids = [json.loads(line)["ids"][:96] for line in lines]
    (folder / "own.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    return folder


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Job]:
    """Score in this process; return the jobs that are scored."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    jobs: list[Job] = []

    def counted(work: object, its_jobs: Sequence[Job], *rest: Any) -> list[dict[str, str]]:
        jobs.extend(its_jobs)
        return in_this_process(work, its_jobs, *rest)

    monkeypatch.setattr("verifier.gate.score.spawned", counted)
    return jobs


def suite_of(folder: Path, candidate: str) -> SuiteResult:
    options = SuiteOptions(workers=1, cache=folder / "cache")
    return run_suite(folder / candidate, BASE, folder / "suite.yaml", options)


def test_a_sound_export_a_damaged_one_and_what_is_kept(
    folder: Path, scored: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    result = suite_of(folder, "sound")
    entries = {entry.name: entry for entry in result.entries}
    assert {name: entry.outcome for name, entry in entries.items()} == {
        "own": "passed",
        "choice": "passed",
        "write": "inconclusive",
        "sampled": "inconclusive",
    }
    assert (result.outcome, result.exit_code, result.looks) == ("inconclusive", 3, 1)
    assert any("cut off at the task's limit" in reason for reason in entries["write"].reasons)
    assert entries["choice"].length is None
    length = entries["write"].length
    assert length is not None
    assert max(length.cut_off) > 0.5
    assert 16 <= length.base_tokens <= 32
    sampled = entries["sampled"]
    assert (sampled.items, sampled.repeats, len(sampled.gate.clusters)) == (8, 2, 16)
    assert len(scored) == 8
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(result.as_json(), schema)

    # Nothing is scored twice, and only what is missing is scored again.
    scored.clear()
    again = suite_of(folder, "sound")
    assert scored == []
    assert again.looks == 1
    assert [e.criteria for e in again.entries] == [e.criteria for e in result.entries]
    runs = [f for f in (folder / "cache").glob("*.run") if b"choice" in f.read_bytes()]
    runs[0].unlink()
    suite_of(folder, "sound")
    assert [job.task and job.task.name for job in scored] == ["choice"]

    # The damaged export fails on the text. The inconclusive run above is a look, too.
    damaged = suite_of(folder, "damaged")
    assert (damaged.outcome, damaged.looks, damaged.alpha) == ("failed", 2, 0.05 / 6)
    outcomes = {entry.name: entry.outcome for entry in damaged.entries}
    assert outcomes["own"] == "failed"
    assert "failed" not in (outcomes["choice"], outcomes["write"])
    jsonschema.validate(damaged.as_json(), schema)

    # The command writes the same verdict in every format, and a line of history.
    out = {name: folder / f"report.{name}" for name in ("json", "html", "md")}
    history = folder / "history.jsonl"
    suite = ["suite", str(folder / "damaged"), "--base", str(BASE), "--workers", "1"]
    suite += ["--suite", str(folder / "suite.yaml"), "--cache", str(folder / "cache")]
    files = [option for file in out.values() for option in ("-o", str(file))]
    assert run([*suite, *files, "--format", "text", "--history", str(history)]) == 1
    text = capsys.readouterr().out
    assert "verdict: FAILED" in text
    assert "own: loss" in text
    assert json.loads(out["json"].read_text())["verdict"] == "failed"
    assert "**FAILED" in out["md"].read_text()
    page = out["html"].read_text()
    assert "suite FAILED" in page
    assert "<script" not in page
    (record,) = load(history).records
    assert (record.kind, record.verdict, record.measures["own.loss"].margin) == (
        "suite",
        "failed",
        damaged.entries[0].criteria[0].margin.nats,
    )
    assert run([*suite, *files]) == 2
    assert "already exists; use --overwrite" in capsys.readouterr().err
    assert run([*suite, "--format", "junit"]) == 2
    assert "unknown format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("max_increase: 30%", "max_increse: 30%", "unknown key. Did you mean max_increase?"),
        ("name: choice", "name: own", "two entries are named own"),
        ("documents: 8", "task: choice.yaml", "give corpus or task, one of both"),
        ("documents: 8", "metric: acc", "metric does not go with a corpus"),
        ("documents: 8", "documents: 0", "greater than or equal to 1"),
        ("documents: 8", "documents: 8, documents: 9", "the key 'documents' is given twice"),
        ("max_increase: 30%, ", "", "a task has no default margin"),
        ("documents: 8", "max_increase: 1, max_kl: much", "max-kl much"),
        ("max_length_change: 0.9", "max_length_change: 200%", "give a percentage of tokens"),
        ("task: choice.yaml", "task: none.yaml", "no such file"),
        ("task: choice.yaml", "task: remote.yaml", "needs a network, or a YAML file with its data"),
        ("own.jsonl", "none.jsonl", "no corpus"),
        ("sampled.yaml", "write.yaml", "repeats need answers that are sampled"),
        ("entries:", "entries: [", "not YAML"),
    ],
)
def test_a_bad_suite_is_one_message(
    folder: Path,
    scored: list[Job],
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    message: str,
) -> None:
    file = folder / "bad.yaml"
    file.write_text(SUITE.replace(before, after, 1))
    assert file.read_text() != SUITE
    code = run(["suite", str(folder / "sound"), "--base", str(BASE), "--suite", str(file)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert error.count("\n") == 1
    assert scored == []
