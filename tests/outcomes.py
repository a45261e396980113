# SPDX-License-Identifier: Apache-2.0
"""Run tests that CI leaves out, and write the outcome of each to a file that is committed."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.paths import ROOT


class _Outcomes:
    """A pytest plugin that keeps the outcome of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def run_and_write(
    command: str,
    tests: Sequence[str],
    results: Path,
    packages: Sequence[str],
    programs: Mapping[str, str] | None = None,
) -> int:
    """Run tests from the root of the repository and return the exit code of pytest.

    Args:
        command: ``python -m tests.ray``; with ``--write`` it writes the results.
        tests: arguments of pytest.
        results: the file of the results.
        packages: whose versions are written.
        programs: the versions of what is no package.
    """
    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--write", action="store_true", help=f"write {results.name}")
    options = parser.parse_args()
    outcomes = _Outcomes()
    code = int(pytest.main(["-m", "not gpu", "--rootdir", str(ROOT), *tests], [outcomes]))
    value = {
        "command": f"{command} --write",
        "tests": dict(sorted(outcomes.of.items())),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
            **(programs or {}),
        },
    }
    if options.write:
        results.write_text(json.dumps(value, indent=1) + "\n")
    return code
