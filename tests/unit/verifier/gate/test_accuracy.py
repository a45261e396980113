# SPDX-License-Identifier: Apache-2.0
"""Right and wrong answers: exact McNemar against a margin, and tasks of lm-eval from YAML files."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.evaluation import Margin
from verifier.gate.comparison import compare_runs
from verifier.gate.decision import margin_of
from verifier.gate.jobs import Job, UnitScores
from verifier.gate.options import ScoringOptions
from verifier.gate.render import render_json, render_run, render_text
from verifier.gate.run_file import Run, RunHeader, read_run, write_run
from verifier.gate.score import JobScores, run_of
from verifier.gate.scorers.lm_eval_task import task_corpus
from verifier.gate.scorers.transformers import score
from verifier.gate.statistics import accuracy_loss, documents_needed, p_of_loss
from verifier.gate.windows import plan_scoring
from verifier.goldens import compare, golden_of

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
D = 14
p_value = cache(p_of_loss)


def test_at_margin_zero_it_is_mcnemars_exact_test() -> None:
    for lost, won in ((0, 0), (5, 0), (9, 4), (30, 25)):
        want = (
            stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue
            if lost + won
            else 1.0
        )
        assert p_of_loss(lost, won, 1000, 0.0, "beyond") == want


@pytest.mark.parametrize("rates", [(0.3, 0.1), (0.2, 0.0), (0.5, 0.3), (0.04, 0.02), (0.25, 0.25)])
def test_the_error_is_bounded_for_every_rate_of_discordant_documents(
    rates: tuple[float, float],
) -> None:
    """Summed over every outcome of 14 documents, at a margin that is the truth; nothing is
    drawn.
    """
    p10, p01 = rates
    truth = p10 - p01
    error = {"beyond": 0.0, "within": 0.0}
    for b, c in itertools.product(range(D + 1), repeat=2):
        if b + c > D:
            continue
        chance = (
            math.comb(D, b) * math.comb(D - b, c) * p10**b * p01**c * (1 - p10 - p01) ** (D - b - c)
        )
        for side in error:
            error[side] += chance * (p_value(b, c, D, truth, side) <= 0.05)  # type: ignore[arg-type]
    assert max(error.values()) <= 0.05


def test_bounds_are_the_test_inverted() -> None:
    for lost, won, count in ((30, 25, 1319), (0, 0, 20), (12, 0, 200), (3, 9, 60)):
        found = accuracy_loss(lost, won, count)
        assert found.low < found.delta < found.high
        assert found.delta == pytest.approx((lost - won) / count)
        for step, tenable in ((-2e-6, True), (2e-6, False)):
            assert (p_of_loss(lost, won, count, found.high + step, "within") > 0.05) is tenable
            assert (p_of_loss(lost, won, count, found.low - step, "beyond") > 0.05) is tenable
    assert accuracy_loss(0, 0, 3).high > 0.8  # three documents that agree prove nothing
    needed = documents_needed(accuracy_loss(0, 0, 20), 0.01)
    assert needed is not None
    assert 700 < needed < 1100


def task_run(right: np.ndarray, *, weights: str, **key: str) -> Run:
    header = RunHeader(
        model=f"/{weights[0]}",
        weights_sha256=weights[0] * 64,
        formats=["NVFP4"],
        key={
            "protocol": "task",
            "task": "t",
            "window": 512,
            "corpus": "t",
            "documents": len(right),
            **key,
        },
        environment={},
        documents=[f"{i:016x}" for i in range(len(right))],
    )
    return Run(header, {"sums": 1.0 - right, "tokens": np.ones(len(right), np.int64)})


def answers(count: int, lost: int, won: int) -> tuple[Run, Run]:
    base, candidate = np.ones(count), np.ones(count)
    base[count // 2 :] = candidate[count // 2 :] = 0
    candidate[:lost] = 0
    candidate[count // 2 : count // 2 + won] = 1
    return task_run(base, weights="a"), task_run(candidate, weights="b")


@pytest.mark.parametrize(
    ("lost", "won", "outcome"),
    [(10, 10, "passed"), (100, 20, "failed"), (30, 10, "inconclusive"), (0, 0, "passed")],
)
def test_three_outcomes(lost: int, won: int, outcome: str) -> None:
    base, candidate = answers(1000, lost, won)
    result = compare_runs(base, candidate, margin_of("3%", [], task=True))
    assert result.outcome == outcome
    assert result.accuracy is not None
    assert (result.accuracy.base, result.accuracy.candidate) == (500, 500 - lost + won)
    text = render_text(result)
    assert f"McNemar  {lost} right by the base alone, {won} by the candidate alone" in text
    assert "margin   0.03000 of accuracy (given, 3% of accuracy)" in text
    assert "perplexity" not in text
    assert json.loads(render_json(result))["accuracy"]["lost"] == lost
    assert (result.unit, result.base_nats) == ("of accuracy", None)
    assert (
        result.losses[0].status
        == {"passed": "within", "failed": "beyond", "inconclusive": "open"}[outcome]
    )
    drift = compare_runs(
        base, candidate, Margin(0.5, ""), drift_against=base, drift_margin=Margin(0.03, "")
    )
    assert drift.outcome == outcome


@pytest.mark.parametrize(
    ("lost", "outcome"), [(10, "within"), (11, "inconclusive"), (90, "worse"), (0, "agrees")]
)
def test_an_accepted_task_is_held_by_its_answers(lost: int, outcome: str) -> None:
    records = []
    for more, won in ((0, 0), (lost, 10 if outcome == "within" else 0)):
        base, candidate = answers(2000, 20 + more, won)
        records.append(golden_of(compare_runs(base, candidate, Margin(0.5, ""))))
    records[0] = records[0].model_copy(
        update={"drift": 0.02 if outcome != "inconclusive" else 0.006}
    )
    judged = compare(*records)
    assert judged.outcome == outcome, judged.sentence
    assert outcome == "agrees" or "of accuracy" in judged.sentence


def test_what_is_refused(tmp_path: Path) -> None:
    base, candidate = answers(10, 1, 0)
    other = task_run(1.0 - candidate.sums, weights="b", metric="acc_norm")
    with pytest.raises(IncomparableError, match="metric"):
        compare_runs(base, other, Margin(0.5, ""))
    half = Run(candidate.header, candidate.arrays | {"sums": np.full(10, 0.5)})
    write_run(tmp_path / "half.run", half)
    with pytest.raises(ContentError, match=r"neither right \(0\) nor wrong"):
        read_run(tmp_path / "half.run")
    with pytest.raises(UsageError, match="no default margin"):
        margin_of(None, ["NVFP4"], task=True)
    for wrong in ("100%", "1.5", "-1%", "x"):
        with pytest.raises(UsageError):
            margin_of(wrong, [], task=True)


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
metadata:
  version: 1.0
"""
CHOICE = """doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}"""
WRITE = """generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: first, filter: [{function: take_first}]}"""


def task_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    nouns = (
        "sky game city film song war team king river church road ship book star year world house "
        "first"
    ).split()
    rows = [
        {"q": f"The {n} is", "choices": [" a", " the", " of"], "gold": i % 3, "t": "the"}
        for i, n in enumerate(nouns)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = {}
    for name, kind, target, more in (
        ("tiny_choice", "multiple_choice", "gold", CHOICE),
        ("tiny_write", "generate_until", "t", WRITE),
        ("tiny_rolling", "loglikelihood_rolling", "t", ""),
    ):
        file = folder / f"{name}.yaml"
        file.write_text(
            TASK.format(name=name, data=folder / "data.jsonl", kind=kind, target=target, more=more)
        )
        found[name] = str(file)
    return found


def nonfinite_answers(job: Job, folder: Path) -> list[int]:
    """Return the documents that a model with a NaN in its last norm answers without a number."""
    broken = shutil.copytree(job.model, folder / "nan")
    norm = open_checkpoint(broken).tensors["language_model.model.norm.weight"]
    with (broken / norm.file).open("r+b") as handle:
        handle.seek(norm.offset)
        handle.write(b"\xc0\x7f")
    two = replace(job.units[0], texts=job.units[0].texts[:2])
    scores: list[UnitScores] = []
    score(replace(job, model=str(broken), units=(two,)), scores.append)
    return scores[0].nonfinite


@pytest.mark.xdist_group("gate")
def test_tasks_from_yaml_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    ckpt, files = open_checkpoint(GOLDEN / "bf16"), task_files(tmp_path, monkeypatch)
    for name, metric, filter_ in (
        ("tiny_choice", "acc", "none"),
        ("tiny_write", "exact_match", "first"),
    ):
        corpus = task_corpus(files[name])
        assert (len(corpus), corpus.name) == (18, name)
        info = corpus.task
        assert info is not None
        assert (info.version, info.shots, info.metric, info.filter) == ("1.0", 0, metric, filter_)
        options = ScoringOptions(corpus, "task", seq_len=128, batch=4)
        plan = plan_scoring([ckpt], options)
        assert [len(unit) for unit in plan.units] == [16, 2]
        scores: list[UnitScores] = []
        job = replace(options.job(ckpt.uri), units=plan.units)
        environment = score(job, scores.append)
        found = run_of(plan, ckpt, JobScores(dict(enumerate(scores)), environment), 0.0)
        write_run(tmp_path / name, found)
        assert read_run(tmp_path / name).header.key["task"] == name
        assert found.tokens.tolist() == [1] * 18
        if name == "tiny_choice":
            assert found.header.chance == pytest.approx(1 / 3)
            assert found.header.nonfinite == []
            assert nonfinite_answers(job, tmp_path) == [0, 1]
            assert 0 < found.sums.sum() < 18
            assert f"{18 - int(found.sums.sum())} of 18 right" in render_run(found, "x")
    with pytest.raises(UsageError, match="no metric 'f1'; available: acc"):
        task_corpus(files["tiny_choice"], "f1")
    with pytest.raises(UsageError, match="loglikelihood_rolling"):
        task_corpus(files["tiny_rolling"])
    gate = ["gate", str(GOLDEN / "mxfp8"), "--base", str(GOLDEN / "bf16"), "--max-increase", "1%"]
    task = ["--protocol", files["tiny_choice"]]
    for args, message in (
        ([*task, "--corpus", "x"], "has its own documents"),
        ([*task, "--kl", "top-k"], "needs the protocol tokens"),
        (["--protocol", str(tmp_path / "none.yaml")], "no such file"),
        (["--protocol", "a b"], "tokens, lm-eval, a task"),
        ([], "--corpus is required"),
        (["--corpus", "x", "--metric", "acc"], "--metric needs a task"),
    ):
        assert run([*gate, *args]) == 2, args
        assert message in capsys.readouterr().err
