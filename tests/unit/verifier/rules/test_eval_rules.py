# SPDX-License-Identifier: Apache-2.0
"""QC701 to QC705 on what was measured: what each says, the verdict and exit code, in every
report.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verifier
from tests.paths import ROOT, TESTS
from tests.results import gate_result, interval
from verifier import gate
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.cli import run
from verifier.errors import UsageError
from verifier.evaluation import (
    Drift,
    Evaluation,
    ExpertReach,
    GateResult,
    KlRatio,
    Margin,
    Measures,
    NotScored,
)
from verifier.findings import Report
from verifier.gate import Run, RunHeader, compare_runs, evaluator, render_json, render_text
from verifier.history import recorded
from verifier.report import render
from verifier.run import check
from verifier.run.merge import merge_reports

DATA = TESTS / "data" / "modelopt"
QWEN, BASE = DATA / "qwen3moe_nvfp4_experts_max", DATA / "src_qwen3moe"


def result(value: float = 0.01, half: float = 0.002, **changed: Any) -> GateResult:
    """Return the result of a gate over 72 documents whose loss is ``value``."""
    fields: dict[str, Any] = {
        "interval": interval(value, half),
        "key": {"protocol": "tokens", "corpus": "c", "documents": 72, "window": 512},
        "environment": {f"package{i}": "1" for i in range(10)},
        "documents": [(2000.0, 2000.0, 1000)] * 72,
        "experts": (ExpertReach("layers.1.experts", 8, ()),),
        "notes": ("simulated coverage at 62 documents: 95%",),
    }
    return gate_result(**fields | changed)


def drift(value: float, outcome: str = "passed", half: float = 0.002) -> GateResult:
    accepted = Drift("accepted", Margin(0.003, "default"), interval(value, half))
    return result(outcome=outcome, drift=accepted)


GOOD = result()
NO_STATISTICS: dict[str, Any] = {
    "interval": None,
    "perplexity_base": math.nan,
    "perplexity_candidate": math.nan,
}


def judged(evaluation: Evaluation, **options: Any) -> Report:
    return check(
        QWEN,
        base=BASE,
        depth="eval",
        evaluate=lambda _c, _b: evaluation,
        **({"select": "QC7"} | options),
    )


def said(report: Report) -> set[tuple[str, str]]:
    return {
        (f.rule, f.severity)
        for f in report.findings
        if f.rule.startswith("QC7") and f.severity != "info"
    }


def test_a_loss_within_its_margin_passes_and_is_told() -> None:
    report = judged(GOOD)
    assert (report.verdict, said(report)) == ("passed", set())
    assert {c.rule for c in report.coverage if c.ran} == {f"QC70{i}" for i in range(1, 6)}
    measured = [f for f in report.by_rule("QC702") if f.severity == "info"]
    assert measured[0].observed == "+0.01000 nats per token [+0.00800, +0.01200]"
    assert "simulated coverage at 62 documents" in measured[1].message
    assert {c.rule: (c.checked, c.of) for c in report.coverage if c.rule.startswith("QC7")} == {
        "QC701": (1, 1),
        "QC702": (1, 1),
        "QC703": (80, 80),
        "QC704": (1, 1),
        "QC705": (14, 14),
    }
    assert report.summary.evaluation == GOOD


def by_kl(log_ratio: float, half: float, outcome: str) -> GateResult:
    """Return a result whose drift is decided by the KL ratio, while its loss is far beyond."""
    margin = Margin(math.log(1.15), "default")
    ratio = KlRatio("lower bounds", 0.003, 0.002, interval(log_ratio, half), margin)
    accepted = Drift("accepted", Margin(0.003, "default"), interval(0.02), ratio)
    return result(outcome=outcome, drift=accepted)


CASES: dict[str, tuple[Evaluation, str, set[tuple[str, str]]]] = {
    "beyond": (result(0.1, outcome="failed"), "failed", {("QC702", "error")}),
    "collapsed": (result(2.0, outcome="failed"), "failed", {("QC701", "error")}),
    "drift": (drift(0.02, "failed"), "failed", {("QC702", "error")}),
    "not finite": (
        result(outcome="failed", nonfinite=[3, 5], **NO_STATISTICS),
        "failed",
        {("QC703", "error")},
    ),
    "base not finite": (
        result(outcome="failed", nonfinite=[3], nonfinite_base=(3,), **NO_STATISTICS),
        "failed",
        {("QC704", "error")},
    ),
    "some hit": (
        result(measures=Measures(beyond=(7,), worst=(7, 0.3, 0.1))),
        "passed",
        {("QC703", "warning")},
    ),
    "a base that guesses": (
        result(documents=[(math.log(512) * 1000, 7000.0, 1000)] * 72),
        "passed",
        {("QC704", "warning")},
    ),
    "unlike environments": (
        result(unlike=("torch 2.6 and 2.13",)),
        "passed",
        {("QC705", "warning")},
    ),
    "unlike protocols": (
        NotScored("window is 512 and 1024", incomparable=True),
        "failed",
        {("QC705", "error")},
    ),
    "inconclusive": (
        result(0.076, outcome="inconclusive", needed=90),
        "inconclusive",
        set(),
    ),
    "doubtful": (
        result(outcome="inconclusive", doubts=("the base is a uniform guess",)),
        "inconclusive",
        set(),
    ),
    "drift by KL": (by_kl(0.3, 0.01, "failed"), "failed", {("QC702", "error")}),
    "drift by KL inconclusive": (by_kl(0.14, 0.01, "inconclusive"), "inconclusive", set()),
    "drift inconclusive": (drift(0.002, "inconclusive"), "inconclusive", set()),
    "collapse inconclusive": (
        result(0.7, 0.2, margin=Margin(0.95, "given")),
        "inconclusive",
        set(),
    ),
    "not scored": (NotScored("8 keys of the model are missing"), "inconclusive", set()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_each_result_comes_to(name: str) -> None:
    evaluation, verdict, findings = CASES[name]
    report = judged(evaluation)
    assert (report.verdict, said(report)) == (verdict, findings)
    assert report.exit_code == {"passed": 0, "failed": 1, "inconclusive": 3}[verdict]
    strict = judged(evaluation, fail_on="warning")
    assert strict.verdict == ("failed" if findings else verdict)


def test_the_reason_of_an_open_verdict_names_numbers_and_documents() -> None:
    why = judged(CASES["inconclusive"][0]).summary.inconclusive
    assert (
        "QC702 examined none of 1 margins: inconclusive: loss increase over the base +0.07600 nats"
        in why
    )
    assert "about 90 documents" in why
    assert "the base is a uniform guess" in judged(CASES["doubtful"][0]).summary.inconclusive
    assert (
        "relative to the accepted run"
        in judged(CASES["drift by KL inconclusive"][0]).summary.inconclusive
    )
    assert "8 keys of the model are missing" in judged(CASES["not scored"][0]).summary.inconclusive


def test_experts_that_no_token_reaches_are_not_judged_by_name() -> None:
    report = judged(
        result(
            experts=(
                ExpertReach("layers.1.experts", 8, (2, 6)),
                ExpertReach("layers.2.experts", 8, ()),
            )
        )
    )
    (covered,) = [c for c in report.coverage if c.rule == "QC703"]
    assert (covered.checked, covered.of) == (72 + 14, 72 + 16)
    assert covered.reason == "no token of the corpus reaches experts layers.1.experts 2, 6"
    assert report.verdict == "passed"
    assert "QC703 (2 of 88 documents and experts not checked: no token of the corpus" in render(
        report, "text"
    )


@pytest.mark.parametrize(
    "format_", ["text", "json", "junit", "sarif", "github", "markdown", "html"]
)
def test_every_report_has_it(format_: str) -> None:
    failed = render(judged(CASES["drift"][0]), format_)
    assert "QC702" in failed
    assert "accepted run exceeds its margin" in failed
    assert "+0.02000 nats per token" in failed
    inconclusive = render(judged(CASES["inconclusive"][0]), format_)
    assert "about 90 documents" in inconclusive
    if format_ == "json":
        value = json.loads(inconclusive)
        assert (value["verdict"], value["stats"]["eval"]["verdict"]) == ("inconclusive",) * 2


@pytest.mark.parametrize("documents", [8, 20])
def test_the_measured_coverage_is_published_and_printed_with_the_verdict(documents: int) -> None:
    rng = np.random.default_rng(documents)
    base = np.full(documents, 800.0)
    runs = []
    for name, sums in (("a", base), ("b", base + rng.normal(4, 1, documents))):
        header = RunHeader(
            model=f"/{name}",
            weights_sha256=name * 64,
            formats=["NVFP4"],
            environment={},
            key={"protocol": "lm-eval", "corpus": "c", "documents": documents, "window": 512},
            documents=[f"{i:016x}" for i in range(documents)],
        )
        runs.append(Run(header, {"sums": sums, "tokens": np.full(documents, 400)}))
    compared = compare_runs(runs[0], runs[1], Margin(0.05, "given"))
    measured = json.loads((Path(gate.__file__).parent / "coverage.json").read_text())[
        str(documents)
    ]
    page = (ROOT / "docs" / "gate.md").read_text()
    for effect in ("skewed", "rare"):
        low, high = (100 * x for x in measured[effect])
        wanted = f"{math.floor(low)}-{round(high)}%"
        for text in (
            render_text(compared),
            json.dumps(json.loads(render_json(compared))["notes"]),
            " ".join(compared.notes),
        ):
            assert f"at {documents} documents: " in text
            assert wanted in text
        assert f"| {documents} | " in page
        assert f"| {low:.1f} |" in page
    reported = judged(compared)
    assert any(f"at {documents} documents: " in f.message for f in reported.by_rule("QC702"))
    record = recorded(reported)
    assert compared.interval is not None
    assert record.measures["loss"].value == pytest.approx(compared.interval.delta)
    assert record.measures["errors"].value == 0
    assert json.loads(str(record.key["eval"]))["window"] == 512


def test_a_subset_scores_once(tmp_path: Path) -> None:
    calls = []

    def evaluate(candidate: Checkpoint, base: Checkpoint) -> Evaluation:
        calls.append((candidate.uri, base.uri))
        return GOOD

    parts = [
        check(QWEN, base=BASE, depth="eval", evaluate=evaluate, subset=f"{i}/2", ignore="QC6")
        for i in (1, 2)
    ]
    assert calls == [(str(QWEN), str(BASE))]
    whole = merge_reports(parts)
    assert whole.verdict == "passed"
    assert {c.rule for c in whole.coverage if c.ran} >= {f"QC70{i}" for i in range(1, 6)}
    report = check(QWEN, base=BASE, depth="eval", evaluate=evaluate, select="QC5")
    assert report.summary.evaluation is None
    assert len(calls) == 1


def test_what_depth_eval_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="needs a base"):
        check(QWEN, depth="eval", evaluate=lambda _c, _b: GOOD)
    with pytest.raises(
        UsageError, match="wikitext2-test not found"
    ):  # what is scored where nothing is named
        monkeypatch.delenv("CKPTGATE_TEST_DATA", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        check(QWEN, base=BASE, depth="eval", select="QC7")
    for args, message in (
        (["--depth", "eval"], "needs --base"),
        (["--corpus", "x.txt"], "--corpus needs --depth eval"),
        (["--depth", "payload", "--max-increase", "8%"], "--max-increase needs --depth eval"),
        (
            ["--depth", "eval", "--base", str(BASE), "--corpus", "absent.txt"],
            "no corpus 'absent.txt'",
        ),
    ):
        assert run(["check", str(QWEN), *args]) == 2
        assert message in capsys.readouterr().err
    # Lower depths list the rules, and their verdict is as it was.
    report = verifier.check(QWEN, base=BASE, depth="payload")
    assert report.verdict == "passed"
    assert {c.reason for c in report.coverage if c.rule.startswith("QC7")} == {"needs --depth eval"}


def test_what_cannot_be_scored_is_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some words")
    folders = []
    for name, source in (("candidate", QWEN), ("base", BASE)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for file in source.iterdir():
            (folders[-1] / file.name).write_bytes(file.read_bytes())
    candidate, base = folders
    measure = evaluator(str(text))

    def why(first: Path, second: Path) -> NotScored:
        found = measure(open_checkpoint(first), open_checkpoint(second))
        assert isinstance(found, NotScored)
        return found

    assert "no tokenizer.json" in why(candidate, base).reason
    for i, folder in enumerate(folders):
        (folder / "tokenizer.json").write_text("{}" + " " * i)
    assert "different tokenizers" in why(candidate, base).reason
    assert why(candidate, base).incomparable
    assert check(candidate, base=base, depth="eval", evaluate=measure, select="QC7").exit_code == 1
    whole = check(QWEN, base=BASE, depth="eval", evaluate=lambda _c, _b: GOOD)
    assert {
        c.rule
        for c in whole.coverage
        if not c.ran and c.reason != "needs --depth engine" and c.rule != "QC605"
    } == set()  # depth load is below it
    assert "give a margin" in why(base, candidate).reason
