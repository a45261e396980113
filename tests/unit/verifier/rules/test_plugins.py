# SPDX-License-Identifier: Apache-2.0
"""Rules of others: a file, an installed package, and every way in which they can be wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import verifier
from tests.paths import ROOT
from verifier.cli import run
from verifier.errors import MachineError, UsageError
from verifier.report import schema
from verifier.rules import all_rules

EXAMPLE = ROOT / "examples" / "ckptgate-example-rules"
MODULE = EXAMPLE / "ckptgate_example_rules.py"
QWEN_NVFP4 = ROOT / "tests" / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
Capture = pytest.CaptureFixture[str]


def plugin(
    folder: Path, body: str = "    ctx.tally.see()\n    yield from ()", **changes: object
) -> Path:
    """Write a plugin with one rule, ACME101 unless told otherwise."""
    given = {"severity": "warning", "depth": "header", "unit": "things", **changes}
    id_, title, doc = (
        given.pop("id", "ACME101"),
        given.pop("title", "a thing"),
        given.pop("doc", "A thing holds."),
    )
    options = ", ".join(f"{k}={v!r}" for k, v in given.items())
    text = f"""from verifier.rules import rule


@rule({id_!r}, {title!r}, {options})
def check(ctx):
    {doc!r}
{body}
"""
    path = folder / f"plugin_{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    return path


def test_a_rule_of_a_file_is_one_of_the_rules(tmp_path: Path, capsys: Capture) -> None:
    report = verifier.check(QWEN_NVFP4, plugins=[MODULE])
    assert report.verdict == "failed"
    assert [(f.rule, f.severity, f.message) for f in report.findings] == [
        ("ACME101", "error", "no LICENSE next to the weights")
    ]
    assert next(c for c in report.coverage if c.rule == "ACME101").checked == 1
    licensed = Path(shutil.copytree(QWEN_NVFP4, tmp_path / "licensed"))
    (licensed / "LICENSE").write_text("x")
    assert verifier.check(licensed, plugins=[MODULE]).verdict == "passed"
    assert run(["check", str(QWEN_NVFP4), "--plugin", str(MODULE), "--format", "json"]) == 1
    value = json.loads(capsys.readouterr().out)
    jsonschema.validate(value, schema())
    assert value["stats"]["options"]["plugins"] == [str(MODULE)]


def test_a_file_leaves_nothing_behind() -> None:
    before = set(all_rules())
    modules = set(sys.modules)
    verifier.check(QWEN_NVFP4, plugins=[MODULE])
    verifier.check(QWEN_NVFP4, plugins=[MODULE])
    assert set(all_rules()) == before
    assert "ACME101" not in before
    assert not {m for m in set(sys.modules) - modules if "plugin_" in m}


def test_a_rule_of_a_plugin_can_be_required(tmp_path: Path) -> None:
    nothing = plugin(tmp_path, "    yield from ()")
    assert verifier.check(QWEN_NVFP4, plugins=[nothing]).verdict == "passed"
    assert (
        verifier.check(QWEN_NVFP4, plugins=[nothing], require=["ACME101"]).verdict == "inconclusive"
    )
    with pytest.raises(UsageError, match="no rule 'ACME101'"):
        verifier.check(QWEN_NVFP4, require=["ACME101"])
    based = plugin(tmp_path, needs=("base",), id="ACME102")
    covered = {c.rule: c for c in verifier.check(QWEN_NVFP4, plugins=[based]).coverage}["ACME102"]
    assert (covered.ran, covered.reason) == (False, "needs --base")


def test_rules_and_explain_know_a_file(capsys: Capture) -> None:
    assert run(["rules", "--format", "json", "--plugin", str(MODULE)]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["id"], row["origin"], row["engines"]) == ("ACME101", str(MODULE), {})
    assert run(["explain", "acme101", "--plugin", str(MODULE)]) == 0
    out = capsys.readouterr().out
    assert "Copy the license of the base model" in out
    assert f"Defined by {MODULE}" in out


def test_every_field_of_every_rule_is_listed(capsys: Capture) -> None:
    assert run(["rules", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in rows] == list(all_rules())
    for row, rule in zip(rows, all_rules().values(), strict=True):
        assert set(row) == {f for f in type(rule).__dataclass_fields__} - {"check", "across"}
        engines = row.pop("engines")
        assert {e: (said["severity"], said["what"]) for e, said in engines.items()} == dict(
            rule.engines
        )
        assert row == json.loads(json.dumps({k: getattr(rule, k) for k in row}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "QC999"}, "QC999: ids that begin with QC are ckptgate's own"),
        ({"id": "QC501"}, "QC501: ids that begin with QC"),
        ({"id": "acme1"}, "acme1: an id is 2 to 12 capital letters"),
        ({"id": "ACME101\n"}, "an id is 2 to 12 capital letters"),
        ({"depth": "abyss"}, "no depth 'abyss'; one of header, payload"),
        ({"severity": "fatal"}, "no severity 'fatal'; one of error, warning"),
        ({"needs": ("base|moon",)}, "cannot need 'moon'; one of base, merged_from"),
        ({"doc": ""}, "no docstring to explain it"),
        ({"unit": ""}, "no unit"),
    ],
)
def test_a_rule_that_is_not_well_formed(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = plugin(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        all_rules([path])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_two_plugins_with_one_id_are_both_named(tmp_path: Path) -> None:
    first, second = plugin(tmp_path), plugin(tmp_path)
    with pytest.raises(UsageError) as caught:
        all_rules([first, second])
    assert str(caught.value) == f"{second}: ACME101 is already a rule of {first}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "import no_such_module_at_all",
            "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        ),
        ("def f(:", "SyntaxError"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("x = 1", "registers no rule"),
        (MODULE.read_text() * 2, "ValueError: ACME101 is registered twice"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_a_usage_error(
    tmp_path: Path, capsys: Capture, text: str, words: str
) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(text)
    for command in (["check", str(QWEN_NVFP4)], ["rules"], ["explain", "QC501"]):
        assert run([*command, "--plugin", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert str(path) in err
        assert words in err


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        all_rules([tmp_path / "nothing.py"])
    with pytest.raises(UsageError, match="no such file"):
        all_rules([tmp_path])
    (tmp_path / "rules.txt").write_text("x = 1")
    with pytest.raises(UsageError, match=r"must end in \.py"):
        all_rules([tmp_path / "rules.txt"])


def test_a_defect_of_a_plugin_names_the_plugin(tmp_path: Path, capsys: Capture) -> None:
    path = plugin(tmp_path, "    yield ctx.no_such_thing")
    with pytest.raises(MachineError, match=f"the rule ACME101 of {path} failed: AttributeError"):
        verifier.check(QWEN_NVFP4, plugins=[path])
    assert run(["check", str(QWEN_NVFP4), "--plugin", str(path), "--format", "json"]) == 4
    value = json.loads(capsys.readouterr().out)
    assert value["verdict"] == "error"
    assert "ACME101" in value["stats"]["error"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a copy of the example package into a folder, without any index."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "--target",
            str(folder / "target"),
            str(source),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return folder / "target"


def call(path: Path, *argv: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command line in an interpreter that has a folder on its path."""
    code = f"{script}\nimport sys\nfrom verifier.cli import run\nsys.exit(run(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )


def test_an_installed_package_joins_by_itself(installed: Path) -> None:
    done = call(installed, "check", str(QWEN_NVFP4))
    assert (done.returncode, done.stderr) == (1, "")
    assert "error   ACME101  no LICENSE next to the weights" in done.stdout
    listed = call(installed, "rules")
    assert listed.stdout.splitlines()[-1].startswith("ACME101")
    explained = call(installed, "explain", "ACME101")
    assert "the package ckptgate-example-rules (ckptgate_example_rules)" in explained.stdout
    assert (
        "ACME101 from the package"
        in call(installed, "doctor", script="import sys; sys.modules['torch'] = None").stdout
    )


def test_a_package_that_was_imported_before_joins_once(installed: Path) -> None:
    done = call(installed, "check", str(QWEN_NVFP4), script="import ckptgate_example_rules")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("error   ACME101") == 1


def test_a_package_and_a_file_of_one_id_collide(installed: Path) -> None:
    done = call(installed, "check", str(QWEN_NVFP4), "--plugin", str(MODULE))
    assert done.returncode == 2
    assert (
        f"{MODULE}: ACME101 is already a rule of the package ckptgate-example-rules" in done.stderr
    )


def test_an_installed_package_that_cannot_be_loaded_is_named(
    installed: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(installed, tmp_path / "target"))
    (broken / "ckptgate_example_rules.py").write_text("import no_such_module_at_all")
    done = call(broken, "check", str(QWEN_NVFP4))
    assert done.returncode == 2
    assert "the rules of the package ckptgate-example-rules" in done.stderr
    assert "No module named 'no_such_module_at_all'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    report = call(broken, "doctor", script="import sys; sys.modules['torch'] = None")
    assert report.returncode == 0
    assert "! custom rules" in report.stdout


def test_the_example_is_as_short_as_the_page_says() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    for file in (MODULE, EXAMPLE / "pyproject.toml"):
        assert file.read_text().partition('"""\n\n')[2 if file is MODULE else 0].strip() in page
