# SPDX-License-Identifier: Apache-2.0
"""Goldens under review: what disagrees is pending and fails; a person accepts, with a reason; an
empty match fails.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.results import gate_result, interval, summary, write_result
from verifier.cli import run
from verifier.evaluation import GateResult
from verifier.findings import Coverage, Finding, Report
from verifier.goldens import compare_with_golden
from verifier.goldens.store import load, load_pending
from verifier.history import load as load_history

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
COUNT, TOKENS = 40, 400


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def gate(loss: float = 0.0, spread: float = 0.0005, **changed: Any) -> GateResult:
    """Return a result whose documents lose ``loss`` nats per token more than a fixed candidate,
    give or take ``spread``.
    """
    fixed, rng = random.Random(1), random.Random(2)  # noqa: S311
    documents = []
    for _ in range(COUNT):
        base = TOKENS * fixed.uniform(2.5, 3.5)
        candidate = base + TOKENS * fixed.gauss(0.007, 0.004)
        extra = TOKENS * rng.gauss(loss, spread) if loss else 0.0
        documents.append((base, candidate + extra, TOKENS))
    return gate_result(
        **{"candidate": "/x/M3-NVFP4", "interval": interval(0.007 + loss), "documents": documents}
        | changed
    )


def goldens(*args: str, folder: Path) -> int:
    return run(["goldens", *args, "-d", str(folder)])


@pytest.fixture
def accepted(tmp_path: Path) -> Path:
    """Return a folder with one accepted gate, made the way a user makes it."""
    folder = tmp_path / "goldens"
    assert goldens("test", write_result(tmp_path / "run.json", gate()), folder=folder) == 1
    assert goldens("accept", "M3-NVFP4.gate", "--reason", "first", folder=folder) == 0
    return folder


def test_the_first_run_is_pending_and_fails_until_it_is_accepted(
    tmp_path: Path, accepted: Path
) -> None:
    assert load(accepted, "M3-NVFP4.gate").accepted.reason == "first"  # type: ignore[union-attr]
    assert not list(accepted.glob("*.pending.json"))
    assert goldens("test", str(tmp_path / "run.json"), folder=accepted) == 0
    assert goldens("list", folder=accepted) == 0


@pytest.mark.parametrize(
    ("loss", "spread", "outcome", "code"),
    [
        (0.001, 0.0005, "within", 0),
        (0.010, 0.0005, "worse", 1),
        (0.0045, 0.006, "inconclusive", 3),
        (-0.004, 0.0005, "stale", 0),
        (-0.0001, 0.00001, "within", 0),
    ],
)
def test_drift_is_a_paired_test_over_documents(
    tmp_path: Path,
    accepted: Path,
    capsys: pytest.CaptureFixture[str],
    loss: float,
    spread: float,
    outcome: str,
    code: int,
) -> None:
    before = (accepted / "M3-NVFP4.gate.golden.json").read_bytes()
    assert (
        goldens("test", write_result(tmp_path / "r.json", gate(loss, spread)), folder=accepted)
        == code
    )
    assert capsys.readouterr().out.splitlines()[-2].startswith(outcome)
    assert (accepted / "M3-NVFP4.gate.pending.json").exists() == (outcome != "within")
    assert (accepted / "M3-NVFP4.gate.golden.json").read_bytes() == before


def test_a_shift_of_base_and_candidate_alike_is_no_drift(accepted: Path) -> None:
    documents = [(b + 0.02 * t, q + 0.02 * t, t) for b, q, t in gate().documents]
    moved = gate(documents=documents)
    assert compare_with_golden(moved, accepted / "M3-NVFP4.gate.golden.json").outcome == "within"


def test_review_shows_old_new_interval_verdict_and_changes_nothing(
    tmp_path: Path, accepted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goldens("test", write_result(tmp_path / "r.json", gate(0.01)), folder=accepted)
    files = {p: p.read_bytes() for p in accepted.iterdir()}
    capsys.readouterr()
    assert goldens("review", folder=accepted) == 0
    out = capsys.readouterr().out
    assert "old    loss +0.00700 [+0.00600, +0.00800]" in out
    assert "new    loss +0.01700 [+0.01600, +0.01800]" in out
    assert "WORSE: drift +0.0" in out
    assert {p: p.read_bytes() for p in accepted.iterdir()} == files


def test_accept_needs_a_reason_a_person_and_a_pending_record(
    tmp_path: Path,
    accepted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    goldens("test", write_result(tmp_path / "r.json", gate(0.01)), folder=accepted)
    before = (accepted / "M3-NVFP4.gate.golden.json").read_bytes()
    assert goldens("accept", "M3-NVFP4.gate", folder=accepted) == 2
    assert goldens("accept", "M3-NVFP4.gate", "--reason", " ", folder=accepted) == 2
    monkeypatch.setenv("CI", "true")
    assert goldens("accept", "M3-NVFP4.gate", "--reason", "x", folder=accepted) == 2
    assert "CI is set" in capsys.readouterr().err
    assert goldens("prune", str(tmp_path / "r.json"), folder=accepted) == 2
    monkeypatch.delenv("CI")
    assert goldens("accept", "nothing*", "--reason", "x", folder=accepted) == 1
    assert (accepted / "M3-NVFP4.gate.golden.json").read_bytes() == before
    assert (
        goldens(
            "accept",
            "M3*",
            "--reason",
            "new recipe",
            "--history",
            str(tmp_path / "h"),
            folder=accepted,
        )
        == 0
    )
    found = load(accepted, "M3-NVFP4.gate")
    assert [a.reason for a in [*found.earlier, found.accepted] if a] == ["first", "new recipe"]
    assert found.loss == pytest.approx(0.017)
    (step,) = load_history(tmp_path / "h").records
    assert (step.kind, step.verdict, step.name) == ("golden", "accepted", "M3-NVFP4")
    assert goldens("test", str(tmp_path / "r.json"), folder=accepted) == 0


def test_what_is_pending_against_another_golden_is_not_accepted(
    tmp_path: Path, accepted: Path
) -> None:
    goldens("test", write_result(tmp_path / "r.json", gate(0.01)), folder=accepted)
    pending = (accepted / "M3-NVFP4.gate.pending.json").read_bytes()
    assert goldens("accept", "*", "--reason", "x", folder=accepted) == 0
    (accepted / "M3-NVFP4.gate.pending.json").write_bytes(pending)
    assert goldens("accept", "*", "--reason", "x", folder=accepted) == 1


def test_logits_that_are_not_finite_are_never_accepted(tmp_path: Path, accepted: Path) -> None:
    bad = gate(outcome="failed", interval=None, nonfinite=[3])
    assert goldens("test", write_result(tmp_path / "r.json", bad), folder=accepted) == 1
    assert goldens("accept", "*", "--reason", "x", folder=accepted) == 1


def test_reject_drops_what_is_pending_alone(tmp_path: Path, accepted: Path) -> None:
    goldens("test", write_result(tmp_path / "r.json", gate(0.01)), folder=accepted)
    before = (accepted / "M3-NVFP4.gate.golden.json").read_bytes()
    assert goldens("reject", "M3-NVFP4.gate", folder=accepted) == 0
    assert [p.read_bytes() for p in accepted.iterdir()] == [before]
    assert goldens("reject", "M3-NVFP4.gate", folder=accepted) == 1


def test_an_unreferenced_golden_fails_until_it_is_pruned(
    tmp_path: Path, accepted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_result(tmp_path / "o.json", gate(candidate="/x/other"))
    goldens("test", other, str(tmp_path / "run.json"), folder=accepted)
    assert goldens("accept", "other*", "--reason", "x", folder=accepted) == 0
    assert goldens("test", str(tmp_path / "run.json"), folder=accepted) == 1
    assert "unreferenced other.gate" in capsys.readouterr().out
    assert goldens("test", str(tmp_path / "run.json"), "--only", "M3*", folder=accepted) == 0
    assert goldens("prune", str(tmp_path / "run.json"), "--dry-run", folder=accepted) == 0
    assert (accepted / "other.gate.golden.json").exists()
    assert goldens("prune", str(tmp_path / "run.json"), folder=accepted) == 0
    assert goldens("test", str(tmp_path / "run.json"), folder=accepted) == 0


def test_a_filter_that_matches_nothing_fails(tmp_path: Path, accepted: Path) -> None:
    assert goldens("test", str(tmp_path / "run.json"), "--only", "Qwen*", folder=accepted) == 1
    assert goldens("list", "Qwen*", folder=accepted) == 1
    assert goldens("review", "Qwen*", folder=accepted) == 1
    assert (
        goldens("review", folder=accepted) == 0
    )  # nothing is pending, and nothing was asked for by name


@pytest.mark.parametrize(
    "key",
    [{"protocol": "tokens", "window": 256}, {"protocol": "tokens", "window": 512, "bos": True}],
)
def test_a_golden_of_another_protocol_is_not_compared(
    tmp_path: Path, accepted: Path, capsys: pytest.CaptureFixture[str], key: dict[str, Any]
) -> None:
    assert goldens("test", write_result(tmp_path / "r.json", gate(key=key)), folder=accepted) == 1
    assert "a different protocol" in capsys.readouterr().out


def test_other_token_counts_under_one_key_are_not_compared(accepted: Path) -> None:
    cut = gate(documents=gate().documents[:-1])
    assert compare_with_golden(cut, accepted / "M3-NVFP4.gate.golden.json").outcome == "unlike"


def test_a_check_is_held_against_its_golden_as_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mxfp8"
    shutil.copytree(GOLDEN / "mxfp8", copy)
    args = [
        "check",
        str(copy),
        "--depth",
        "payload",
        "--golden",
        str(tmp_path / "g" / "mxfp8.golden.json"),
    ]
    assert run(args) == 1
    assert "no accepted record yet" in capsys.readouterr().err
    assert (
        run(["goldens", "accept", "mxfp8", "--reason", "as released", "-d", str(tmp_path / "g")])
        == 0
    )
    assert run(args) == 0
    config = copy / "config.json"
    config.unlink()
    assert run(args) == 1
    capsys.readouterr()
    assert run(["goldens", "review", "-d", str(tmp_path / "g")]) == 0
    assert "CHANGED" in capsys.readouterr().out
    assert run([*args[:-1], str(tmp_path / "g" / "x.json")]) == 2


def test_fewer_findings_make_the_golden_stale(tmp_path: Path) -> None:
    finding = Finding("QC501", "error", "zero block scales", count=2)
    coverage = (Coverage("QC501", True, 5, 5, "blocks"),)
    report = Report("failed", "/x/ckpt", None, (finding,), coverage, summary(5))
    file = tmp_path / "c.golden.json"
    assert compare_with_golden(report, file).outcome == "new"
    assert goldens("accept", "c", "--reason", "known bad", folder=tmp_path) == 0
    assert compare_with_golden(report, file).outcome == "agrees"
    better = replace(report, findings=(), verdict="passed")
    assert compare_with_golden(better, file).outcome == "stale"
    larger = replace(report, summary=summary(6))
    assert compare_with_golden(larger, file).outcome == "changed"


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 200, "a b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, accepted: Path, name: str
) -> None:
    assert goldens("test", f"{name}={tmp_path / 'run.json'}", folder=accepted) == 2
    assert goldens("show", name, folder=accepted) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"kind": "gate"}', '{"documents": [[NaN, 1, 2]]}']
)
def test_a_golden_that_is_none_is_an_error_of_contents(
    tmp_path: Path, accepted: Path, text: str
) -> None:
    (accepted / "M3-NVFP4.gate.golden.json").write_text(text)
    assert goldens("test", str(tmp_path / "run.json"), folder=accepted) == 1
    assert goldens("show", "M3-NVFP4.gate", folder=accepted) == 1


@pytest.mark.parametrize(("old", "new"), [("unproven", "inconclusive"), ("failed", "failed")])
def test_a_record_of_version_1_0_is_read_with_the_verdicts_named_as_now(
    accepted: Path, old: str, new: str
) -> None:
    file = accepted / "M3-NVFP4.gate.golden.json"
    value = json.loads(file.read_text()) | {"schema_version": "1.0", "verdict": old}
    file.write_text(json.dumps(value))
    read = load(accepted, "M3-NVFP4.gate")
    assert (read.schema_version, read.verdict) == ("1.1", new)
    assert compare_with_golden(gate(), file).outcome == "agrees"


def test_sums_come_back_to_the_last_bit(tmp_path: Path, accepted: Path) -> None:
    goldens("test", write_result(tmp_path / "r.json", gate(0.01)), folder=accepted)
    kept = load_pending(accepted, "M3-NVFP4.gate").proposed.documents
    assert list(kept) == gate(0.01).documents
    assert compare_with_golden(gate(), accepted / "M3-NVFP4.gate.golden.json").outcome == "agrees"


def test_records_below_goldens_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "goldens" / "records", tmp_path / "goldens" / "records")
    monkeypatch.chdir(tmp_path)
    assert run(["goldens", "list"]) == 0
    assert "minimax-m3-tiny.mixed" in capsys.readouterr().out
