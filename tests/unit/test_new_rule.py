# SPDX-License-Identifier: Apache-2.0
"""tools/new_rule.py: its stubs are found, run, and fail until they are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import ROOT
from verifier.rules import all_rules
from verifier.selftest.tiny import TINY, make

Run = Callable[..., subprocess.CompletedProcess[str]]
TESTS = Path("tests") / "unit" / "verifier" / "rules"
NOT_WRITTEN = "is not written yet"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of what the tool edits."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "verifier", copy / "verifier", ignore=ignore)
    (copy / "tools").mkdir()
    shutil.copyfile(ROOT / "tools" / "new_rule.py", copy / "tools" / "new_rule.py")
    (copy / TESTS).mkdir(parents=True)
    return copy


@pytest.fixture
def run(copy: Path) -> Run:
    """Return a function that runs Python on the copy."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_stubs_run_and_say_that_they_are_not_written(copy: Path, run: Run, tmp_path: Path) -> None:
    number = 1 + max(int(rule[2:]) for rule in all_rules() if rule.startswith("QC5"))
    rule, name = f"QC{number}", f"qc{number}_brand_new"
    made = run("tools/new_rule.py", "QC5xx", "brand_new")
    assert made.returncode == 0, made.stderr
    files = [f"verifier/rules/qc5xx/{name}.py", "verifier/selftest/defects/qc5xx.py"]
    assert made.stdout.splitlines()[:3] == [*files, f"tests/unit/verifier/rules/test_{name}.py"]

    explained = run("-m", "verifier", "explain", rule)
    assert "What it does" in explained.stdout and "\nFix\n" in explained.stdout

    checkpoint = make(tmp_path, TINY[0]).path
    check = run("-m", "verifier", "check", checkpoint, "--select", rule, "--depth", "payload")
    assert check.returncode == 4 and f"{rule} {NOT_WRITTEN}" in check.stderr

    change = f"""
from pathlib import Path
from verifier.selftest import CORRUPTORS
(corruptor,) = [c for c in CORRUPTORS if c.rule == {rule!r}]
corruptor.apply(Path({str(checkpoint)!r}))
"""
    assert f"the defect of {rule} {NOT_WRITTEN}" in run("-c", change).stderr

    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / f"test_{name}.py")
    assert tests.returncode == 1
    assert f"{rule} {NOT_WRITTEN}" in tests.stdout
    assert f"the test of {rule} {NOT_WRITTEN}" in tests.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("QC501", "zero"), "QC501 exists already"),
        (("ACME1", "zero"), "'ACME1' is not an id"),
        (("QC5xx", "Zero-Scale"), "'Zero-Scale' is not a name"),
    ],
)
def test_refusals(arguments: tuple[str, str], message: str, run: Run) -> None:
    refused = run("tools/new_rule.py", *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
