# SPDX-License-Identifier: Apache-2.0
"""The environment report against pyproject.toml and against environments that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.paths import ROOT
from verifier.cli import run
from verifier.doctor import CORE, EXTRAS, Item, _numbers, core_broken


def stated(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s>=<\[]", r)[0] for r in requirements}


def test_the_tables_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(CORE) == stated(project["dependencies"])
    extras = project["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"all", "test"}
    for extra, (names, enables) in EXTRAS.items():
        assert set(names) == stated(extras[extra])
        assert enables


def doctor(script: str = "", **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run the command in a fresh interpreter; return its exit code and the items by name."""
    call = "from verifier.cli import run\nimport sys\nsys.exit(run(['doctor', '--format', 'json']))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{script}\n{call}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    value = json.loads(done.stdout)
    assert value["core"] == ("broken" if done.returncode else "ok")
    return done.returncode, {i["name"]: i for i in value["items"]}


def test_a_working_environment() -> None:
    code, items = doctor()
    assert code == 0
    assert {items[n]["state"] for n in (*CORE, "decoding", "rules")} == {"ok"}
    assert items["python"]["value"].startswith(".".join(map(str, sys.version_info[:3])))


def test_a_missing_extra_is_no_failure_and_names_its_mending() -> None:
    code, items = doctor("import sys; sys.modules['torch'] = None; sys.modules['jinja2'] = None")
    assert code == 0
    assert items["export"]["state"] == items["torch"]["state"] == "missing"
    assert "pip install 'ckptgate[export]'" in items["export"]["value"]
    assert "jinja2" in items["report"]["value"]


@pytest.mark.parametrize("module", ["numpy", "ml_dtypes", "yaml"])
def test_a_core_without_a_package_is_broken(module: str) -> None:
    code, items = doctor(f"import sys; sys.modules['torch'] = None; sys.modules[{module!r}] = None")
    assert code == 4
    assert items["PyYAML" if module == "yaml" else module]["state"] == "missing"


def test_a_table_that_decodes_wrongly_is_broken() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from verifier import decoding; decoding.e4m3_table()[0x7E] = 447"
    )
    code, items = doctor(script)
    assert code == 4
    assert "decodes to 447.0, not 448.0" in items["decoding"]["value"]


def test_a_temporary_folder_that_is_not_there() -> None:
    script = (
        "import sys, tempfile; sys.modules['torch'] = None; "
        "tempfile.tempdir = '/nonexistent/folder'"
    )
    code, items = doctor(script)
    assert code == 0
    assert items["temp"]["state"] == "broken"


def test_versions_compare_as_numbers() -> None:
    assert _numbers("2.10.1+cpu") == (2, 10, 1) > _numbers("2.6")
    assert _numbers("2.0") == _numbers("2") == (2,)
    assert _numbers("unknown") == ()


def test_only_the_core_breaks_it() -> None:
    assert core_broken([Item("core", "numpy", "", "missing")])
    assert not core_broken([Item("cuda", "torch", "", "broken"), Item("core", "numpy", "", "ok")])


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [x for x in out.splitlines() if not x.startswith(" ")][:-1] == [
        "machine",
        "core",
        "extras",
        "cuda",
        "space",
        "entry points",
    ]
