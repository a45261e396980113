# SPDX-License-Identifier: Apache-2.0
"""Fingerprints that stay, and a baseline that hides nothing that is new or worse."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import verifier
from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import UsageError
from verifier.findings import Coverage, Finding, Where
from verifier.run.baseline import Baseline, BaselineEntry, accept, load, prune, save
from verifier.run.fingerprints import fingerprint, fingerprinted, kind, place
from verifier.selftest.editor import RawShard, read_shard, write_shard

QWEN_NVFP4 = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    monkeypatch.chdir(tmp_path)

    def one(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return one


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    return Path(shutil.copytree(QWEN_NVFP4, tmp_path / "candidate"))


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of a checkpoint's one shard."""
    file = folder / "model.safetensors"
    shard = read_shard(file)
    for name in names:
        del shard.entries[name]
    write_shard(file, shard)


def scale(layer: int, expert: int, leaf: str = "up_proj") -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.input_scale"


def prints(folder: Path, **options: object) -> set[str]:
    return {f.fingerprint for f in verifier.check(folder, **options).findings}  # type: ignore[arg-type]


# fingerprints


def test_a_fingerprint_is_of_the_defect_and_not_of_the_files(
    candidate: Path, tmp_path: Path
) -> None:
    drop(candidate, scale(0, 2))
    before = prints(candidate)
    assert len(before) == 1
    assert all(len(p) == 32 for p in before)
    moved = Path(shutil.copytree(candidate, tmp_path / "elsewhere" / "moved"))
    assert prints(moved) == before
    (moved / "model.safetensors").rename(moved / "weights.safetensors")
    assert prints(moved) == before
    # Two shards with an index, the tensors in reverse order.
    whole = read_shard(moved / "weights.safetensors")
    (moved / "weights.safetensors").unlink()
    names = list(reversed(whole.entries))
    index = {}
    for number, part in enumerate((names[:100], names[100:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        shard = RawShard(whole.metadata)
        shard.entries |= {n: whole.entries[n] for n in part}
        write_shard(moved / file, shard)
        index |= dict.fromkeys(part, file)
    (moved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert prints(moved) == before
    # Another layer, another expert, more of them: the same kind of defect.
    drop(candidate, scale(1, 5), scale(1, 6))
    assert prints(candidate) == before
    # Another projection, another rule: another.
    drop(candidate, scale(1, 5, "down_proj"))
    assert prints(candidate) > before
    assert prints(candidate, profile="sglang") == prints(candidate)


def test_container_findings_do_not_name_their_shard(candidate: Path) -> None:
    file = candidate / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(8))
    before = prints(candidate)
    file.rename(candidate / "other name.safetensors")
    assert prints(candidate) == before != set()
    file = candidate / "other name.safetensors"
    file.write_bytes(file.read_bytes() + bytes(16))
    assert prints(candidate) == before


def found(rule: str, message: str, where: Where | None = None) -> Finding:
    return Finding(rule, "error", message, where or Where(), cause=message)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            found("QC103", "a-1.safetensors holds 3 tensors"),
            found("QC103", "b.safetensors holds 14 tensors"),
        ),
        (found("QC103", "in a.safetensors, b.safetensors"), found("QC103", "in c.safetensors")),
        (
            found("QC208", "of [128, 64]", Where("a.0.b")),
            found("QC208", "of [64, 1,024]", Where("a.7.b")),
        ),
        (
            found("QC5", "x", Where("a", "f.safetensors", 1, 2, 3)),
            replace(found("QC5", "x", Where("a")), severity="warning", observed="o", count=9),
        ),
        (found("QC5", "by 1.5e-3 or +7"), found("QC5", "by 2 or -1,000.25")),
    ],
)
def test_what_is_not_part_of_a_fingerprint(one: Finding, other: Finding) -> None:
    assert (kind(one), place(one)) == (kind(other), place(other))
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (found("QC301", "x"), found("QC302", "x")),
        (found("QC301", "stored as F32"), found("QC301", "stored as BF16")),
        (found("QC301", "NVFP4: w1"), found("QC301", "NVFP8: w1")),
        (found("QC301", "x", Where("a.w1")), found("QC301", "x", Where("a.w2"))),
        (
            found("QC406", "x", Where(None, "config.json")),
            found("QC406", "x", Where(None, "b.json")),
        ),
        (found("QC404", "'a.*'"), found("QC404", "'b.*'")),
        (found("QC301", "a", Where("b")), found("QC301", "a\0b")),
    ],
)
def test_what_is_part_of_a_fingerprint(one: Finding, other: Finding) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_a_message_may_be_reworded() -> None:
    one = found("QC301", "no input_scale", Where("a.0.b"))
    other = replace(one, message="the module has no scale of its inputs")
    assert fingerprint(one) == fingerprint(other)
    plugin = replace(one, rule="ACME101", cause="")
    assert fingerprint(plugin) != fingerprint(replace(plugin, message="other words"))
    assert fingerprint(replace(plugin, cause="x")) == fingerprint(
        replace(other, rule="ACME101", cause="x")
    )


def test_every_finding_of_a_rule_that_reports_several_kinds_states_its_cause() -> None:
    for file in sorted((Path(verifier.__file__).parent / "rules").glob("qc[1-6]xx/qc*.py")):
        calls = [
            node
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "finding"
        ]
        without = [c.lineno for c in calls if "cause" not in {k.arg for k in c.keywords}]
        assert len(calls) < 2 or not without, (file.name, without)


def test_a_hostile_name_has_a_fingerprint_and_an_entry(tmp_path: Path) -> None:
    found = fingerprinted([Finding("QC201", "error", "x\ud800", Where("a.\ud800\x1b[31m"))])
    baseline, new, raised = accept(Baseline(), found, "because \ud800")
    assert (new, raised) == (1, 0)
    save(baseline, tmp_path / "b.json")
    assert load(tmp_path / "b.json").compare(found, ()).findings[0].standing == "known"


# judging


def entry(
    finding: Finding, count: int = 1, severity: str = "error", reason: str = "as agreed"
) -> BaselineEntry:
    return BaselineEntry(
        fingerprint=fingerprint(finding),
        rule=finding.rule,
        severity=severity,
        count=count,
        reason=reason,
    )  # type: ignore[arg-type]


ONE = Finding("QC301", "error", "one", Where("a.0.b"), count=3)
TWO = Finding("QC302", "warning", "two")
RAN = (Coverage("QC301", True, 5, 5, "x"), Coverage("QC302", True, 5, 5, "x"))


@pytest.mark.parametrize(
    ("count", "severity", "standing"),
    [
        (3, "error", "known"),
        (4, "error", "known"),
        (2, "error", "grown"),
        (3, "warning", "grown"),
        (9, "info", "grown"),
    ],
)
def test_an_entry_holds_as_long_as_nothing_got_worse(
    count: int, severity: str, standing: str
) -> None:
    baseline = Baseline(entries=(entry(ONE, count, severity),))
    judged = baseline.compare(fingerprinted([ONE, TWO]), RAN)
    assert [f.standing for f in judged.findings] == [standing, ""]
    assert "as agreed" in judged.findings[0].note
    if standing == "grown":
        assert judged.findings[0].note == f"3 error now, {count} {severity} accepted (as agreed)"


def test_findings_of_one_fingerprint_are_held_against_their_sum() -> None:
    """Two shards that are cut have one fingerprint; the entry of one must not cover both."""
    cut = [
        Finding("QC104", "error", f"{n}.safetensors is cut", Where(None, f"{n}.safetensors"))
        for n in "ab"
    ]
    baseline = Baseline(entries=(entry(cut[0], 1),))
    assert [f.standing for f in baseline.compare(fingerprinted(cut[:1]), ()).findings] == ["known"]
    assert [f.standing for f in baseline.compare(fingerprinted(cut), ()).findings] == [
        "grown",
        "grown",
    ]


def test_an_entry_is_stale_only_where_its_rule_looked_at_everything() -> None:
    baseline = Baseline(entries=(entry(ONE), entry(TWO)))
    judged = baseline.compare([], RAN)
    assert ([e.rule for e in judged.stale], judged.not_judged) == (["QC301", "QC302"], 0)
    part = (
        Coverage("QC301", True, 4, 5, "x", "unreadable"),
        Coverage("QC302", False, 0, 0, "x", "depth payload"),
    )
    judged = baseline.compare([], part)
    assert (judged.stale, judged.not_judged) == ([], 2)
    assert prune(baseline, [], part)[1:] == (0, 0)
    gone = Baseline(entries=(entry(Finding("QC999", "error", "of a rule that is no more")),))
    assert len(gone.compare([], RAN).stale) == 1


def test_accept_keeps_reasons_and_prune_lowers() -> None:
    first, new, raised = accept(Baseline(), fingerprinted([ONE, TWO]), "first")
    assert (new, raised) == (2, 0)
    worse = Finding("QC301", "error", "one", Where("a.0.b"), count=7)
    second, new, raised = accept(first, fingerprinted([worse, TWO]), "second")
    assert (new, raised) == (0, 1)
    assert {e.rule: (e.count, e.reason) for e in second.entries} == {
        "QC301": (7, "second"),
        "QC302": (1, "first"),
    }
    assert accept(second, fingerprinted([ONE]), "third")[0] == second
    third, dropped, lowered = prune(second, fingerprinted([ONE]), RAN)
    assert (dropped, lowered) == (1, 1)
    assert [(e.rule, e.count, e.reason) for e in third.entries] == [("QC301", 3, "second")]


def test_a_note_is_no_debt() -> None:
    assert accept(Baseline(), fingerprinted([Finding("QC106", "info", "x")]), "r")[0].entries == ()


# the command line


def test_adopt_today_fail_on_what_is_new_or_worse_and_prune(
    call: Call, candidate: Path, tmp_path: Path
) -> None:
    file = tmp_path / "known.json"
    drop(candidate, scale(0, 2))
    assert call("check", candidate)[0] == 1
    code, out, err = call(
        "baseline", "write", candidate, "--baseline", file, "--reason", "calibration set of v1"
    )
    assert (code, err) == (0, "")
    assert out == f"{file}: 1 entry (1 new, 0 raised)\n"
    (only,) = load(file).entries
    assert (only.rule, only.count, only.severity, only.reason) == (
        "QC301",
        1,
        "error",
        "calibration set of v1",
    )
    assert only.place == "model.layers.*.mlp.experts.*.up_proj.input_scale"

    code, out, err = call("check", candidate, "--baseline", file)
    assert (code, err) == (0, "")
    assert "known   QC301" in out
    assert "(calibration set of v1)" in out
    assert f"baseline: {file}: 1 known, 0 grown, 0 stale" in out
    assert "verdict: PASSED at depth header (0 errors, 0 warnings, 1 known; " in out

    drop(candidate, scale(0, 3))
    code, out, _ = call("check", candidate, "--baseline", file)
    assert code == 1
    assert "grown: 2 error now, 1 error accepted (calibration set of v1)" in out
    assert "verdict: FAILED at depth header (1 error, 0 warnings; " in out
    assert call("baseline", "write", candidate, "--baseline", file, "--reason", "again")[
        1
    ].endswith("(0 new, 1 raised)\n")
    assert call("check", candidate, "--baseline", file)[0] == 0

    drop(candidate, scale(1, 3, "down_proj"))
    code, out, _ = call("check", candidate, "--baseline", file)
    assert code == 1
    assert "verdict: FAILED at depth header (1 error, 0 warnings, 1 known; " in out

    whole = Path(shutil.copytree(QWEN_NVFP4, tmp_path / "whole"))
    code, out, _ = call("check", whole, "--baseline", file)
    assert code == 0
    assert (
        "0 known, 0 grown, 1 stale (`ckptgate baseline prune` removes "
        "QC301 the module has no input_scale)" in out
    )
    before = file.read_text()
    code, out, _ = call("baseline", "prune", whole, "--baseline", file, "--ignore", "QC301")
    assert (code, file.read_text()) == (0, before)
    code, out, _ = call("baseline", "prune", whole, "--baseline", file)
    assert (code, out) == (0, f"{file}: 0 entries (1 removed, 0 lowered)\n")
    assert load(file).entries == ()


def test_a_known_defect_that_moved_is_said(call: Call, candidate: Path, tmp_path: Path) -> None:
    file, whole = tmp_path / "known.json", Path(shutil.copytree(candidate, tmp_path / "whole"))
    drop(candidate, scale(0, 2))
    assert call("baseline", "write", candidate, "--baseline", file, "--reason", "v1")[0] == 0
    assert "when accepted" not in call("check", candidate, "--baseline", file)[1]
    drop(whole, scale(1, 7))
    code, out, _ = call("check", whole, "--baseline", file)
    assert code == 0
    assert f"(v1; first {scale(1, 7)}, when accepted {scale(0, 2)})" in out


def test_a_known_warning_does_not_fail_under_fail_on_warning(
    call: Call, candidate: Path, tmp_path: Path
) -> None:
    file = candidate / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(8))
    known = tmp_path / "known.json"
    assert call("check", candidate, "--fail-on", "warning")[0] == 1
    assert call("baseline", "write", candidate, "--baseline", known, "--reason", "padding")[0] == 0
    assert call("check", candidate, "--fail-on", "warning", "--baseline", known)[0] == 0
    # What was accepted as a warning is not accepted as an error.
    code, out, _ = call("check", candidate, "--profile", "strict", "--baseline", known)
    assert code == 1
    assert "1 error now, 1 warning accepted" in out


def test_a_baseline_never_proves_what_was_not_examined(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    known = tmp_path / "known.json"
    code, _, err = call(
        "baseline", "write", tmp_path / "empty", "--baseline", known, "--reason", "x"
    )
    assert code == 2
    assert "the directory is empty" in err
    assert not known.exists()
    save(Baseline(entries=(entry(ONE),)), known)
    assert (
        call(
            "check",
            tmp_path / "empty",
            "--baseline",
            known,
            "--profile",
            "all",
            "--ignore",
            "QC104",
        )[0]
        == 2
    )


def test_a_reason_and_a_file_are_required(call: Call, tmp_path: Path) -> None:
    known = tmp_path / "known.json"
    code, out, err = call("baseline", "write", QWEN_NVFP4, "--baseline", known)
    assert (code, out) == (2, "")
    assert "--reason" in err
    assert call("baseline", "write", QWEN_NVFP4, "--baseline", known, "--reason", " ")[0] == 2
    code, _, err = call("baseline", "write", QWEN_NVFP4, "--reason", "x")
    assert code == 2
    assert "--baseline is required" in err
    code, _, err = call("baseline", "prune", QWEN_NVFP4, "--baseline", known)
    assert code == 2
    assert "`ckptgate baseline write` makes one" in err
    assert not known.exists()


def written(count: int = 1, reason: str = "x", times: int = 1) -> str:
    one = {
        "fingerprint": "0" * 32,
        "rule": "QC1",
        "severity": "error",
        "count": count,
        "reason": reason,
    }
    return json.dumps({"version": 2, "entries": [one] * times})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("[]", ""),
        ('{"version": 3, "entries": []}', "version"),
        ('{"version": 1, "entries": []}', "not of version 2"),
        ('{"version": 2, "entries": [], "more": 1}', "more"),
        ('{"version": 2, "entries": [{"fingerprint": "x"}]}', "entries.0.fingerprint"),
        (written(count=0), "entries.0.count"),
        (written(reason=""), "entries.0.reason"),
        (written(times=2), "two entries"),
    ],
)
def test_a_file_that_is_no_baseline_is_a_usage_error(
    call: Call, tmp_path: Path, text: str, words: str
) -> None:
    known = tmp_path / "known.json"
    known.write_text(text)
    code, out, err = call("check", QWEN_NVFP4, "--baseline", known)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(known) in err
    assert words in err
    with pytest.raises(UsageError):
        load(known)
