# SPDX-License-Identifier: Apache-2.0
"""What is public, what an error ends with, and which room may import which."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import exporter
import verifier
from tests.paths import ROOT
from verifier.errors import EXIT_CODES, CkptgateError
from verifier.findings import EXIT_OF_VERDICT


def test_the_public_names_are_these() -> None:
    assert verifier.__all__ == [
        "Checkpoint",
        "CkptgateError",
        "Coverage",
        "Finding",
        "Report",
        "Where",
        "check",
        "decode",
        "diff",
        "gate",
        "open_checkpoint",
    ]
    assert exporter.__all__ == [
        "adapters",
        "calibrate",
        "codecs",
        "export",
        "export_model",
        "merge",
        "plan_export",
        "plan_repair",
        "repair",
    ]


@pytest.mark.parametrize("name", ["verifier", "exporter"])
def test_the_public_names_are_sorted_and_importable(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__ == sorted(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    for public in package.__all__:
        found = getattr(package, public)
        assert found is not None
        assert found.__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from {name} import no_such_name")  # noqa: S102


def test_importing_the_packages_imports_neither_torch_nor_numpy() -> None:
    heavy = "('torch', 'numpy', 'transformers')"
    script = f"import sys, verifier, exporter; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_star_imports_give_the_public_names() -> None:
    for package in (verifier, exporter):
        names: dict[str, object] = {}
        exec(f"from {package.__name__} import *", names)  # noqa: S102
        assert set(names) - {"__builtins__"} == set(package.__all__)


def tree(error: type[CkptgateError]) -> Iterator[type[CkptgateError]]:
    yield error
    for child in error.__subclasses__():
        yield from tree(child)


def test_every_error_has_an_exit_code() -> None:
    import verifier.errors

    found = list(tree(CkptgateError))
    assert {"UsageError", "MissingExtra", "ContentError", "MachineError"} <= {
        e.__name__ for e in found
    }
    for error in found:
        assert error.exit_code in EXIT_CODES
        assert error.__doc__
        assert f"{error.__name__} " in (verifier.errors.__doc__ or ""), (
            "the tree at the top of errors.py lacks it"
        )


def test_the_tree_in_the_docstring_states_the_exit_codes() -> None:
    import verifier.errors

    stated = dict(
        re.findall(
            r"(\w+Error|MissingExtra|UnsupportedConversion)\s+(\d)\s", verifier.errors.__doc__ or ""
        )
    )
    assert stated == {e.__name__: str(e.exit_code) for e in tree(CkptgateError)}


def test_every_verdict_has_an_exit_code() -> None:
    assert set(EXIT_OF_VERDICT) == {"passed", "failed", "inconclusive", "error"}
    assert set(EXIT_OF_VERDICT.values()) <= set(EXIT_CODES)
    assert set(EXIT_CODES) == {0, 1, 2, 3, 4, 130, 143}


def test_the_import_contracts_hold() -> None:
    beside = Path(sys.executable).with_name("lint-imports")
    command = str(beside) if beside.exists() else shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
