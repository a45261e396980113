# SPDX-License-Identifier: Apache-2.0
"""Depth engine: findings, coverage and verdicts from what an engine answers, and an interpreter
that fails. The interpreter is a script that answers lines as written here; `tests/engines` runs
vLLM itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import TESTS
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.engines.loader import kinds_of_layers, layers_that_fit
from verifier.errors import MachineError, UsageError
from verifier.findings import Report
from verifier.rules import all_rules
from verifier.run import check
from verifier.run.options import EngineOptions

DATA = TESTS / "data" / "modelopt"
QWEN, BASE = DATA / "qwen3moe_nvfp4_experts_max", DATA / "src_qwen3moe"
CLEAN: dict[str, Any] = {
    "architecture": "Qwen3MoeForCausalLM",
    "parameters": 50,
    "tensors": 200,
    "unwritten": [],
    "unused": [],
    "casts": [],
    "bad_scales": [],
    "warnings": [],
}
REJECTED = {"stage": "weight loading", "error": "KeyError: 'w2_bias'", "place": "gpt_oss.py:load"}
HALF = {"name": "qkv.weight_scale", "share": 0.25, "bytes": 512, "tensors": ["lm_head.weight"]}
WHOLE = {"name": "norm.weight", "share": 1.0, "bytes": 128, "tensors": []}
CAST = {"name": "qkv.scale", "tensor": "lm_head.weight", "have": "bfloat16", "want": "uint8"}
ZERO = {"name": "w13_scale", "tensor": "", "zeros": 3, "nonfinite": 0, "of": 64}


def interpreter(folder: Path, candidate: dict[str, Any], base: dict[str, Any] = CLEAN) -> str:
    """Return a script that answers as vLLM's process does."""
    path = folder / "python"
    answers = json.dumps({str(QWEN): candidate, str(BASE): base})
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nanswers = json.loads({answers!r})\n"
        "def say(value):\n    print(json.dumps(value), flush=True)\n"
        "sys.stdin.readline()\nsay({'ready': {'engine': 'vllm 0.32.0'}})\n"
        "for line in sys.stdin:\n"
        "    question = json.loads(line)\n"
        "    say({'id': question['id'], 'loaded': answers[question['model']]})\n"
    )
    path.chmod(0o755)
    return str(path)


def checked(
    folder: Path, candidate: dict[str, Any], base: dict[str, Any] = CLEAN, **options: Any
) -> Report:
    engine = EngineOptions(interpreter(folder, candidate, base))
    selection = {"select": "QC601,QC602,QC603"} | options
    return check(QWEN, base=BASE, depth="engine", engine=engine, **selection)


def found(report: Report) -> list[tuple[str, str]]:
    return sorted((f.rule, f.severity) for f in report.findings)


def test_a_load_without_defects_passes_and_is_counted(tmp_path: Path) -> None:
    report = checked(tmp_path, CLEAN)
    assert (report.verdict, found(report)) == ("passed", [])
    counted = {c.rule: (c.checked, c.of) for c in report.coverage if c.ran}
    assert counted == {"QC601": (1, 1), "QC602": (50, 50), "QC603": (200, 200)}


@pytest.mark.parametrize(
    ("answer", "rules", "verdict"),
    [
        (REJECTED, [("QC601", "error")], "failed"),
        (CLEAN | {"unwritten": [HALF, WHOLE]}, [("QC602", "error")] * 2, "failed"),
        (CLEAN | {"unused": ["x.weight"]}, [("QC603", "warning")], "passed"),
        (CLEAN | {"warnings": ["a must match b"]}, [("QC603", "warning")], "passed"),
        (CLEAN | {"casts": [CAST]}, [("QC603", "error")], "failed"),
        (CLEAN | {"bad_scales": [ZERO]}, [("QC603", "error")], "failed"),
    ],
    ids=["rejected", "unwritten", "unused", "warning", "cast", "zero-scale"],
)
def test_what_the_engine_does_is_a_finding(
    tmp_path: Path, answer: dict[str, Any], rules: list[tuple[str, str]], verdict: str
) -> None:
    report = checked(tmp_path, answer)
    assert (report.verdict, found(report)) == (verdict, rules)
    assert all("vllm 0.32.0" in f.observed for f in report.findings)


def test_a_rejection_names_the_tensor_it_is_about(tmp_path: Path) -> None:
    listed = "There is no module named 'mtp'. The available parameters are: {'lm_head.weight'}"
    for error, tensor in ((listed, None), ("KeyError: 'lm_head.weight'", "lm_head.weight")):
        report = checked(tmp_path, REJECTED | {"error": error})
        assert report.findings[0].where.tensor == tensor


def test_what_also_happens_to_the_base_is_not_reported(tmp_path: Path) -> None:
    same = {"unwritten": [WHOLE], "unused": ["x.weight"], "warnings": ["a must match b"]}
    assert found(checked(tmp_path, CLEAN | same, CLEAN | same)) == []
    report = checked(tmp_path, CLEAN | same | {"unwritten": [WHOLE, HALF]}, CLEAN | same)
    assert found(report) == [("QC602", "error")]
    finding = report.findings[0]
    assert finding.where.tensor == "lm_head.weight"
    assert "qkv.weight_scale: 25.000%, 512 bytes" in finding.observed


@pytest.mark.parametrize(
    ("answer", "base", "reason"),
    [
        (REJECTED, REJECTED, "rejects the base as well"),
        (REJECTED | {"stage": "model construction", "unbuildable": True}, CLEAN, "fails on a CPU"),
        (REJECTED, REJECTED | {"unbuildable": True}, "the base could not be loaded"),
    ],
    ids=["the-base-too", "no-kernel", "no-control"],
)
def test_what_cannot_be_built_is_inconclusive(
    tmp_path: Path, answer: dict[str, Any], base: dict[str, Any], reason: str
) -> None:
    report = checked(tmp_path, answer, base)
    assert (report.verdict, found(report)) == ("inconclusive", [])
    assert reason in report.summary.inconclusive


def test_depth_engine_runs_the_rules_of_header_and_payload_and_not_of_load(tmp_path: Path) -> None:
    report = checked(tmp_path, CLEAN, select=())
    depths = {all_rules()[c.rule].depth for c in report.coverage if c.ran}
    assert depths == {"header", "payload", "engine"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('print(\'{"error": "ImportError: no vllm"}\')', "no vllm"),
        ("print('{\"ready\": {}}')", "did not report that it is ready"),
        ("sys.exit('broken')", "ended: broken"),
        (
            'print(\'{"ready": {"engine": "vllm 1"}}\', flush=True)\n'
            "sys.stdin.readline()\nprint('{\"id\": 2}')",
            "another question",
        ),
    ],
)
def test_an_interpreter_without_a_working_engine(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.readline()\n{lines}\n")
    path.chmod(0o755)
    with pytest.raises(MachineError, match=message):
        check(QWEN, depth="engine", engine=EngineOptions(str(path)), select="QC601")


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--depth", "engine"], "needs --engine-python"),
        (["--engine-python", "x"], "--engine-python needs --depth engine"),
        (["--engine-layers", "2"], "--engine-layers needs --depth engine"),
        (["--depth", "engine", "--engine-python", "/absent/python"], "No such file"),
    ):
        assert run(["check", str(QWEN), *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="needs an interpreter"):
        check(QWEN, depth="engine")
    with pytest.raises(UsageError, match="needs --depth engine"):
        check(QWEN, engine=EngineOptions("python"))
    with pytest.raises(UsageError, match="0 layers"):
        check(QWEN, depth="engine", engine=EngineOptions("python", layers=0))


def test_the_fewest_layers_that_show_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = open_checkpoint(TESTS.parent / "goldens" / "minimax-m3-tiny" / "bf16")
    assert kinds_of_layers(golden) == 2  # a dense one, then sparse ones
    assert layers_that_fit(golden) is None
    monkeypatch.setattr("verifier.engines.loader.free_memory", lambda: int(golden.nbytes * 2))
    assert layers_that_fit(golden) == 2
    monkeypatch.setattr("verifier.engines.loader.free_memory", lambda: 1)
    assert layers_that_fit(golden) == 0
