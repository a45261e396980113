# SPDX-License-Identifier: Apache-2.0
"""Severities: the rule's, the finding's, the engine's, the user's; which of them decides, and what
is said of it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import verifier
from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import UsageError
from verifier.findings import Effect, Finding, Report, Severity, Where
from verifier.rules import all_rules
from verifier.run.group import MAX_GROUPS, group
from verifier.run.severity import ENGINES, PROFILES, Severities
from verifier.selftest.editor import read_shard, write_shard

QWEN_NVFP4 = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.input_scale"


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    return Path(shutil.copytree(QWEN_NVFP4, tmp_path / "candidate"))


def declare(folder: Path, change: dict[str, Any]) -> None:
    """Change both declarations of a checkpoint."""
    config, file = folder / "config.json", folder / "hf_quant_config.json"
    body = json.loads(config.read_text())
    body["quantization_config"] |= change
    config.write_text(json.dumps(body))
    body = json.loads(file.read_text())
    body["quantization"] |= change
    file.write_text(json.dumps(body))


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of a checkpoint's one shard."""
    file = folder / "model.safetensors"
    shard = read_shard(file)
    for name in names:
        del shard.entries[name]
    write_shard(file, shard)


@pytest.fixture
def containers(candidate: Path) -> Path:
    """Make a mixed checkpoint whose quantized_layers names the containers of the experts, as
    published ones do.
    """
    entry = {"quant_algo": "NVFP4", "group_size": 16}
    layers = {f"model.layers.{i}.mlp.experts": entry for i in (0, 1)}
    declare(candidate, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    return candidate


@pytest.fixture
def holed(candidate: Path) -> Path:
    """Make a checkpoint in which one expert has no input_scale."""
    drop(candidate, EXPERT)
    return candidate


def of(report: Report, rule: str) -> Finding:
    (finding,) = {f.message: f for f in report.by_rule(rule)}.values()
    return finding


# the precedence, without a checkpoint


def judged(rule: str, profile: str | None = None, levels: Any = None, **fields: Any) -> Finding:
    finding = Finding(rule, fields.pop("severity", all_rules()[rule].severity), "x", **fields)
    return Severities(all_rules(), profile, levels).apply(finding)


def test_without_a_profile_the_severity_is_the_rules_or_the_findings() -> None:
    assert (judged("QC301").severity, judged("QC301").because) == ("error", "")
    assert (
        judged("QC301", severity="warning").severity,
        judged("QC301", severity="warning").because,
    ) == ("warning", "")


def test_a_profile_takes_what_the_engine_does() -> None:
    found = judged("QC301", "sglang")
    assert (found.severity, found.because) == ("warning", "sglang: takes 1.0 as the scale")
    assert judged("QC301", "vllm").severity == "error"
    found = judged("QC301", "transformers")
    assert (found.severity, found.because) == ("error", "")
    assert judged("QC106", "vllm").severity == "info"


def test_a_finding_that_states_its_own_severity_keeps_it_unless_it_speaks_of_the_engine() -> None:
    assert judged("QC410", "trtllm", severity="warning").severity == "warning"
    assert judged("QC410", "trtllm").because.startswith("trtllm: drops the scales")
    effects = (Effect("trtllm", "error", "matches exactly"),)
    found = judged("QC410", "trtllm", severity="warning", effects=effects)
    assert (found.severity, found.because) == ("error", "trtllm: matches exactly")
    assert judged("QC410", "vllm", severity="warning", effects=effects).severity == "warning"
    assert judged("QC410", None, severity="warning", effects=effects).severity == "warning"


def test_all_takes_the_worst_engine_and_strict_raises_warnings() -> None:
    assert judged("QC301", "all").because.startswith("vllm: ")
    effects = (Effect("sglang", "error", "dies"),)
    assert judged("QC105", "all", effects=effects).severity == "error"
    assert judged("QC105", "all").severity == "error"  # vLLM rejects the file
    assert judged("QC109", "all").severity == "warning"
    found = judged("QC105", "strict")
    assert (found.severity, found.because) == ("error", "profile strict")
    assert judged("QC105", "strict", severity="info").severity == "info"
    assert judged("QC301", "strict", severity="warning").severity == "error"


def test_what_the_user_sets_decides_over_everything() -> None:
    tensor = Where("model.layers.3.mlp.experts.1.w2.input_scale")
    levels = {
        "QC3": "warning",
        "QC301": {"*.w2.*": "info", "*.experts.1.*": "error"},
        "ALL": "info",
    }
    assert judged("QC302", levels=levels).severity == "warning"
    assert judged("QC501", levels=levels).severity == "info"
    assert judged("QC302", "strict", levels).severity == "warning"
    assert judged("QC301", levels=levels, where=Where("other")).severity == "warning"
    # Of two globs that match, the later one.
    found = judged("QC301", levels=levels, where=tensor)
    assert (found.severity, found.because) == (
        "error",
        "configuration: QC301 *.experts.1.* is error",
    )
    assert (
        judged(
            "QC301", levels={"QC301": {"*.w2.*": "info"}, "QC3": "warning"}, where=tensor
        ).severity
        == "info"
    )
    # A glob of a shorter prefix decides over a longer prefix without one.
    assert (
        judged("QC301", levels={"QC301": "error", "QC": {"*.w2.*": "info"}}, where=tensor).severity
        == "info"
    )
    # A finding without a tensor has no name to match.
    assert judged("QC301", levels={"QC301": {"*": "info"}}).severity == "error"


@pytest.mark.parametrize(
    ("profile", "levels", "words"),
    [
        ("vlm", None, "nearest: vllm"),
        (None, {"QC301": "fatal"}, "no level 'fatal'"),
        (None, {"QC9": "info"}, "no rule 'QC9'"),
        (None, {"QC301": {"*": "eror"}}, "nearest: error"),
    ],
)
def test_what_is_unknown_is_a_usage_error(profile: str | None, levels: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verifier.check(QWEN_NVFP4, profile=profile, severity=levels)


def test_every_engine_of_a_rule_is_a_profile() -> None:
    for rule in all_rules().values():
        assert set(rule.engines) <= set(ENGINES) < set(PROFILES), rule.id
        for severity, what in rule.engines.values():
            assert severity in ("error", "warning", "info")
            assert what
            assert what.isprintable()


# on checkpoints


def test_a_parent_container_is_a_warning_and_an_error_under_trtllm(containers: Path) -> None:
    plain = verifier.check(containers)
    assert (plain.verdict, of(plain, "QC410").severity) == ("passed", "warning")
    trtllm = verifier.check(containers, profile="trtllm")
    assert trtllm.verdict == "failed"
    found = of(trtllm, "QC410")
    assert found.severity == "error"
    assert found.because == "trtllm: matches names exactly and drops the scales of unlisted modules"
    assert found.fingerprint == of(plain, "QC410").fingerprint
    assert verifier.check(containers, profile="vllm").verdict == "passed"
    assert verifier.check(containers, profile="strict").verdict == "failed"
    assert verifier.check(containers, profile="all").verdict == "failed"


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        ("last lost", "warning"),
        ("first lost", "warning"),
        ("last wrong", "warning"),
        ("first wrong", "error"),
        ("all lost", "error"),
    ],
)
def test_vllm_gives_all_experts_of_a_layer_their_first_entry(
    candidate: Path, change: str, severity: str
) -> None:
    leaves = [f"{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]
    names = [f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in leaves]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    declare(candidate, mixed)
    assert not verifier.check(candidate, profile="vllm").by_rule("QC410")
    which, what = change.split()
    changed = {"first": names[:1], "last": names[-1:], "all": names[:24]}[which]
    for name in changed:
        if what == "lost":
            del layers[name]
        else:
            layers[name] = {"quant_algo": "FP8"}
    declare(candidate, mixed)
    findings = verifier.check(candidate, profile="vllm").by_rule("QC410")
    assert {f.severity for f in findings if (f.where.tensor or "").startswith(changed[0])} == {
        severity
    }
    assert verifier.check(candidate).verdict == "failed"


def test_a_missing_input_scale_is_a_warning_under_sglang(holed: Path) -> None:
    assert verifier.check(holed).verdict == "failed"
    found = verifier.check(holed, profile="sglang")
    assert {f.severity for f in found.by_rule("QC301")} == {"warning"}
    assert found.verdict == "passed"
    assert verifier.check(holed, profile="sglang", fail_on="warning").verdict == "failed"
    assert found.summary.options.profile == "sglang"


@pytest.mark.parametrize(
    ("pattern", "under_vllm"), [("0.mlp.exp", "failed"), ("experts.3.up", "passed")]
)
def test_vllm_matches_substrings_of_the_container_of_experts(
    candidate: Path, pattern: str, under_vllm: str
) -> None:
    """It never asks for a single expert."""
    ignore = json.loads((candidate / "config.json").read_text())["quantization_config"]["ignore"]
    declare(candidate, {"ignore": [*ignore, pattern], "exclude_modules": [*ignore, pattern]})
    assert verifier.check(candidate, select="QC401").verdict == "passed"
    assert verifier.check(candidate, select="QC401").findings
    assert verifier.check(candidate, select="QC401", profile="vllm").verdict == under_vllm
    assert verifier.check(candidate, select="QC401", profile="trtllm").verdict == "passed"


def test_a_glob_splits_one_kind_of_finding(candidate: Path) -> None:
    lost = [f"model.layers.{i}.mlp.experts.3.up_proj.input_scale" for i in (0, 1)]
    drop(candidate, *lost)
    whole = verifier.check(candidate, select="QC301")
    assert [(f.severity, f.count) for f in whole.findings] == [("error", 2)]
    split = verifier.check(
        candidate, select="QC301", severity={"QC301": {"model.layers.0.*": "info"}}
    )
    assert [(f.severity, f.count, f.where.tensor) for f in split.findings] == [
        ("error", 1, lost[1]),
        ("info", 1, lost[0]),
    ]


def test_all_prints_what_every_engine_does(holed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(holed), "--profile", "all"]) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["engines", *ENGINES] in lines
    assert ["QC301", "error", "warning", "error", "(error)"] in lines
    assert "sglang: takes 1.0 as the scale" in out
    assert run(["check", str(holed), "--profile", "vllm"]) == 1
    assert "engines " not in capsys.readouterr().out


def test_explain_prints_what_engines_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "QC504"]) == 0
    out = capsys.readouterr().out
    for engine, (severity, what) in all_rules()["QC504"].engines.items():
        assert f"  {engine:12}  {severity:7}  {what}" in out


def test_findings_beyond_the_limit_have_the_worst_severity_of_theirs() -> None:
    def many(worst: Severity) -> list[Finding]:
        names = [f"t{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(MAX_GROUPS + 3)]
        found = [Finding("QC201", "info", "x", Where(name)) for name in names]
        return [*found[:-2], replace(found[-2], severity=worst), found[-1]]

    for worst in ("error", "warning", "info"):
        rest = group(many(worst), 0)[-1]
        assert (rest.severity, rest.count, rest.message) == (worst, 3, "and more of other names")
