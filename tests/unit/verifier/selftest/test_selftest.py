# SPDX-License-Identifier: Apache-2.0
"""``ckptgate selftest``: tiny checkpoints are valid, defects are caught, unverified rules fail."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import verifier
from tests import oracle
from verifier.cli import cli
from verifier.errors import UsageError
from verifier.findings import Where
from verifier.rules import all_rules
from verifier.selftest import CORRUPTORS, CheckpointEditor, Corruptor, tiny
from verifier.selftest import runner as module
from verifier.selftest.corruptor import on
from verifier.selftest.runner import DEPTHS, as_json, lines, selftest
from verifier.selftest.tiny import TINY, encode, make


def _some_rules() -> list[str]:
    """Return ten rules, the same on every run of one set of rules."""
    rules = sorted(
        {c.rule for c in CORRUPTORS} & {r.id for r in all_rules().values() if r.depth in DEPTHS}
    )
    return random.Random(5).sample(rules, 10)  # noqa: S311


@pytest.mark.parametrize("spec", TINY, ids=lambda t: t.name)
def test_tiny_checkpoints_are_sound(spec: tiny.TinySpec, tmp_path: Path) -> None:
    made = make(tmp_path, spec)
    for report in (
        verifier.check(made.path, base=made.base, merged_from=made.merged_from, depth="payload"),
        verifier.check(made.path, depth="payload"),
    ):
        assert [f for f in report.findings if f.severity != "info"] == []
        assert report.verdict == "passed"
    with safe_open(
        made.path / CheckpointEditor(made.path).shards[0], framework="numpy"
    ) as file:  # another reader
        assert file.metadata() == {"format": "pt"}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", TINY[5]), make(tmp_path / "b", TINY[5])
    other = make(tmp_path / "c", TINY[5], seed=1)
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes()
    assert any(
        f.read_bytes() != (other.path / f.name).read_bytes() for f in one.path.glob("*.safetensors")
    )


def test_nvfp4_of_the_builder_is_the_oracles() -> None:
    values = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    mine, theirs = encode(values, "nvfp4"), oracle.nvfp4_encode(values)
    for leaf in ("weight", "weight_scale"):
        assert mine[leaf].view(np.uint8).tobytes() == theirs[leaf].tobytes()


@pytest.mark.parametrize("rule", _some_rules())
def test_a_seeded_part_of_it(rule: str) -> None:
    result = selftest([rule])
    assert result.passed, [line for line in lines(result) if "MISSED" in line or "NOT" in line]
    assert {t.rule for t in result.trials} == {rule}


def test_command_prints_json_and_exits_0() -> None:
    done = CliRunner().invoke(cli, ["selftest", "--rule", "qc501", "--format", "json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said["passed"] is True
    assert said["unverified"] == {}
    assert {d["rule"] for d in said["defects"]} == {"QC501"}
    assert all(c["passed"] for c in said["clean"])


def test_unknown_rule_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="QC999"):
        selftest(["QC999"])
    with pytest.raises(UsageError, match="no-such"):
        selftest(checkpoints=["no-such"])


def _nothing(ckpt: CheckpointEditor) -> Where:
    return Where()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ((), "no defect"),
        ((Corruptor("QC501", "does-nothing", _nothing),), "missed"),
        ((Corruptor("QC501", "unfit", _nothing, on(traits="unknown")),), "its defects suit no"),
        ((Corruptor("QC501", "needs-stats", _nothing, on(needs="stats")),), "needs stats"),
    ],
    ids=["none", "missed", "unfit", "needs"],
)
def test_a_rule_that_nothing_verifies_fails(
    table: tuple[Corruptor, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CORRUPTORS", table)
    result = selftest(["QC501"], checkpoints=["llama-nvfp4"])
    assert not result.passed
    assert result.unverified["QC501"].startswith(why)
    assert any("NOT VERIFIED" in line for line in lines(result))


def test_a_clean_checkpoint_with_a_finding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TINY", TINY[:1])
    monkeypatch.setattr(module, "make", lambda root, spec: _spoilt(make(root, TINY[0])))
    result = selftest(["QC104"])
    assert not result.passed
    assert as_json(result)["clean"][0]["findings"] == ["QC105"]  # type: ignore[index]


def _spoilt(made: tiny.TinyCheckpoint) -> tiny.TinyCheckpoint:
    with (made.path / "model.safetensors").open("ab") as file:
        file.write(bytes(8))
    return made


def test_without_torch_in_an_empty_folder(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from verifier.cli import run\n"
        "sys.exit(run(['selftest', '--rule', 'QC104', '--rule', 'QC515']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selftest: passed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_rule_is_in_the_result() -> None:
    result = selftest(checkpoints=["llama-nvfp4"])
    assert set(result.rules) == set(all_rules())


def test_what_the_clean_twin_says_too_is_no_other_rule() -> None:
    result = selftest(["QC605"], checkpoints=["minimax-m3-mixed", "minimax-m3-mxfp8"])
    notes = {n for c in result.clean for n in c.notes}
    assert {"QC310", "QC414"} & notes, notes
    others = {t.name: t.others for t in result.trials}
    assert not notes & set().union(*others.values()), others
    assert others["one-scale-of-a-kept-tensor"] == {"QC517"}


def test_rules_of_depths_load_and_eval_are_listed_apart() -> None:
    result = selftest(["QC104", "QC606", "QC608", "QC702"], checkpoints=["llama-nvfp4"])
    assert result.passed
    assert result.not_run == ("QC606", "QC608", "QC702")
    said = list(lines(result))
    assert any(line.startswith("not run here: QC606, QC608, QC702") for line in said)
    assert said[-1].endswith("1/1 rules verified")
    assert not any(line.startswith("QC608") for line in said)
    assert as_json(result)["not_run"] == ["QC606", "QC608", "QC702"]
