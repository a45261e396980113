# SPDX-License-Identifier: Apache-2.0
"""The package ``ckptgate``: every public name, lazily; and what it says of a stranger's
``verifier``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckptgate
import exporter
import verifier
from tests.paths import ROOT

QWEN_NVFP4 = ROOT / "tests" / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
Done = subprocess.CompletedProcess[str]


def python(*arguments: str, path: Path | None = None) -> Done:
    """Run Python in a process of its own, with a folder before ckptgate on the module path."""
    folders = [str(path)] if path else []
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=path or ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*folders, str(ROOT)]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )


@pytest.fixture(params=["verifier package", "verifier module", "exporter package"])
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with another package named as one of ckptgate's."""
    if request.param == "verifier module":
        (tmp_path / "verifier.py").write_text("raise SystemExit('a stranger ran')")
    elif request.param == "verifier package":
        (tmp_path / "verifier").mkdir()
        (tmp_path / "verifier" / "__init__.py").write_text("raise SystemExit('a stranger ran')")
    else:
        (tmp_path / "exporter").mkdir()
        (tmp_path / "exporter" / "__init__.py").write_text("")
    return tmp_path


def test_every_public_name_of_both_packages_is_one_of_ckptgate() -> None:
    names = {*verifier.__all__, *exporter.__all__}
    assert {*ckptgate.__all__} == {*names, "__version__"}
    assert ckptgate.__all__ == sorted(ckptgate.__all__)
    for name in names:
        owner = verifier if name in verifier.__all__ else exporter
        assert getattr(ckptgate, name) is getattr(owner, name)
    assert ckptgate.__version__ == verifier.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        ckptgate.no_such_name  # noqa: B018


def test_importing_it_imports_neither_package() -> None:
    heavy = "('verifier', 'exporter', 'numpy', 'torch', 'click')"
    done = python("-c", f"import sys, ckptgate; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout == "[]\n"


def test_python_m_ckptgate_is_the_command_line() -> None:
    done = python("-m", "ckptgate", "check", str(QWEN_NVFP4))
    assert done.returncode == 0
    assert "verdict: PASSED" in done.stdout


def test_another_package_of_the_same_name_is_named_in_one_line(strange: Path) -> None:
    done = python("-m", "ckptgate", "check", str(QWEN_NVFP4), path=strange)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"ckptgate: {strange}{os.sep}")
    assert done.stderr.count("\n") == 1
    assert str(ROOT) in done.stderr


def test_the_python_names_say_the_same(strange: Path) -> None:
    done = python("-c", "import ckptgate; ckptgate.check", path=strange)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {strange}{os.sep}")


def test_pytest_still_runs_where_another_verifier_is_first(strange: Path) -> None:
    (strange / "test_mine.py").write_text("def test_mine(): pass")
    command = ("-m", "pytest", "-q", "-p", "ckptgate.pytest_plugin", "-p", "no:cacheprovider")
    done = python(*command, path=strange)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    done = python(*command, f"--ckptgate={QWEN_NVFP4}", path=strange)
    assert done.returncode == 4
    assert done.stderr.startswith(f"ERROR: ckptgate: {strange}{os.sep}")
