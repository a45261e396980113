# SPDX-License-Identifier: Apache-2.0
"""Help, suggestions, the texts of rules, and shell completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import click
import pytest

from tests.paths import ROOT, TESTS
from verifier.cli import run
from verifier.cli.main import SECTIONS, cli
from verifier.rules import Rule, all_rules
from verifier.rules.texts import HEADINGS, section, sections, summary
from verifier.suggest import suggestions, with_numbers_of

QWEN_NVFP4 = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
Capture = pytest.CaptureFixture[str]


def test_the_help_lists_every_command_once_in_sections(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    titles = [f"{title}:" for title in SECTIONS]
    assert [line for line in out.splitlines() if line in titles] == titles
    ctx = click.Context(cli)
    for name in cli.list_commands(ctx):
        assert sum(line.startswith(f"  {name} ") for line in out.splitlines()) == 1, name
    assert "More:" not in out


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        ([], "Usage: ckptgate [OPTIONS]"),
        (["check"], "Usage: ckptgate check [OPTIONS] PATH..."),
        (["history", "log"], "Usage: ckptgate history log [OPTIONS]"),
    ],
)
def test_help_of_a_command(argv: list[str], usage: str, capsys: Capture) -> None:
    assert run(["help", *argv]) == 0
    out = capsys.readouterr().out
    assert out.startswith(usage)
    assert run([*argv, "--help"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek", "x"], "unknown command 'chek'. Did you mean check?"),
        (["quantize"], "unknown command 'quantize'. Did you mean export?"),
        (["zzz"], "unknown command 'zzz'. `ckptgate --help` lists all commands."),
        (["help", "explian"], "Did you mean explain?"),
        (["history", "lgo"], "unknown command 'lgo'. Did you mean log?"),
        (["explain", "QC5O1"], "no rule 'QC5O1'; nearest: QC501"),
        (["check", str(QWEN_NVFP4), "--profile", "tensorrt"], "nearest: trtllm;"),
        (["check", str(QWEN_NVFP4), "--profile", "vlm"], "nearest: vllm;"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(argv: list[str], message: str, capsys: Capture) -> None:
    assert run(argv) == 2
    assert message in capsys.readouterr().err


def test_a_mistyped_tensor_keeps_its_numbers(capsys: Capture) -> None:
    name = "model.layers.1.mlp.experts.5.dwn_proj.weight"
    assert run(["show", str(QWEN_NVFP4), name]) == 1
    assert "Did you mean model.layers.1.mlp.experts.5.down_proj.weight" in capsys.readouterr().err


def test_suggestions() -> None:
    assert suggestions("CHECK", ["check", "score"]) == ["check"]
    assert suggestions("", ["check"]) == []
    assert suggestions("quantize", ["check"]) == []
    known = {"a.1.b", "a.2.b"}
    assert with_numbers_of("a.2.c", "a.*.b", known) == "a.2.b"
    assert with_numbers_of("a.3.c", "a.*.b", known) is None
    assert with_numbers_of("a.c", "a.*.b", known) is None


@pytest.mark.parametrize("rule", all_rules().values(), ids=all_rules())
def test_every_rule_has_its_sections(rule: Rule) -> None:
    assert tuple(sections(rule.doc)) == HEADINGS
    assert summary(rule.doc)
    assert section(rule.doc, "Fix")
    assert "**" not in " ".join([summary(rule.doc), *sections(rule.doc).values()])


def test_explain_renders_the_text(capsys: Capture) -> None:
    assert run(["explain", "QC501"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("QC501  zero weight scale\nerror, depth payload, counts weight scales\n")
    assert "**" not in out
    assert "``" not in out
    for heading in HEADINGS:
        assert f"\n\n{heading}\n  " in out
    assert max(map(len, out.splitlines())) <= 100


def test_explain_takes_rules_and_prefixes(capsys: Capture) -> None:
    assert run(["explain", "QC501", "qc7", "--format", "json"]) == 0
    ids = [rule["id"] for rule in json.loads(capsys.readouterr().out)]
    assert ids == ["QC501", *(i for i in all_rules() if i.startswith("QC7"))]


def test_rules_of_a_selection(capsys: Capture) -> None:
    assert run(["rules", "--select", "QC1,QC501"]) == 0
    ids = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert ids == [i for i in all_rules() if i.startswith("QC1") or i == "QC501"]


def _completed(words: str, instruction: str) -> list[str]:
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from ckptgate.__main__ import main; main()"],
        env=environment | {"_CKPTGATE_COMPLETE": instruction},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"numpy", "torch"} & imported
    return done.stdout.splitlines()


def test_shells_complete_commands_and_options() -> None:
    assert _completed("ckptgate che", "bash_complete") == ["plain,check"]
    assert "plain,gate" in _completed("ckptgate g", "bash_complete")
    assert "plain,--statistics" in _completed("ckptgate check --stat", "bash_complete")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert "_CKPTGATE_COMPLETE" in "\n".join(_completed("", f"{shell}_source"))
