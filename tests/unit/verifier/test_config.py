# SPDX-License-Identifier: Apache-2.0
"""Which configuration file is read, what it may hold, and what the command line does to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

import verifier
from tests.paths import ROOT, TESTS
from verifier.cli import run
from verifier.config import KEYS, Config, effective, find, load
from verifier.errors import UsageError
from verifier.rules import all_rules
from verifier.run.select import Selection, prefixes
from verifier.run.severity import PROFILES

DATA = TESTS / "data" / "modelopt"
QWEN_NVFP4 = DATA / "qwen3moe_nvfp4_experts_max"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def one(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return one


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder below another one."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    """Copy a clean checkpoint and put bytes after its last tensor: one warning, QC105."""
    folder = Path(shutil.copytree(QWEN_NVFP4, tmp_path / "padded"))
    with (folder / "model.safetensors").open("ab") as handle:
        handle.write(bytes(8))
    return folder


# selection


def selected(**options: object) -> set[str]:
    ids = list(all_rules())
    selection = Selection(ids, **options)  # type: ignore[arg-type]
    return {i for i in ids if not selection.why_not(i)}


def test_prefixes_select_and_the_longer_one_decides() -> None:
    ids = set(all_rules())
    fives = {i for i in ids if i.startswith("QC5")}
    assert selected() == ids
    assert selected(select="QC5") == fives
    assert selected(select=["qc501, QC502", "QC101"]) == {"QC501", "QC502", "QC101"}
    assert selected(ignore=["QC5"]) == ids - fives
    assert selected(select="QC5", ignore="QC504") == fives - {"QC504"}
    assert selected(select="QC504", ignore="QC5") == {"QC504"}
    assert selected(select="QC504", ignore="QC504") == set()
    assert selected(select="ALL", ignore="QC1") == {i for i in ids if not i.startswith("QC1")}
    assert selected(select="QC501", ignore="ALL") == {"QC501"}
    assert selected(ignore="ALL") == set()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("QC999", ("'QC999'", "ckptgate rules")),
        ("QC50l", ("nearest: QC5",)),
        ("", ("empty",)),
        ("QC501,,QC502", ("empty",)),
        ("QB5", ("nearest: QC5",)),
        ("QC5011", ("nearest: ", "QC501")),
    ],
)
@pytest.mark.parametrize("option", ["--select", "--ignore", "--require"])
def test_an_unknown_rule_is_a_usage_error(
    call: Call, option: str, text: str, words: tuple[str, ...]
) -> None:
    code, out, err = call("check", QWEN_NVFP4, option, text)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for word in (option, *words):
        assert word in err


def test_a_prefix_keeps_its_order_and_stands_once() -> None:
    assert prefixes(["QC5,qc1", "QC5"], all_rules(), "--select") == ("QC5", "QC1")


def test_a_deselected_rule_is_listed(call: Call) -> None:
    report = verifier.check(QWEN_NVFP4, select="QC1,QC2", ignore="QC104")
    assert {c.rule for c in report.coverage} == set(all_rules())
    reasons = {c.rule: c.reason for c in report.coverage}
    assert (reasons["QC104"], reasons["QC301"]) == ("ignored by QC104", "not selected")
    assert {c.rule[:3] for c in report.coverage if c.ran} == {"QC1", "QC2"}
    assert report.summary.options.select == ("QC1", "QC2")
    code, out, _ = call("check", QWEN_NVFP4, "--ignore", "QC104,QC3", "--verbose")
    assert code == 0
    assert "QC104 (ignored by QC104)" in out
    assert "(ignored by QC3)" in out


def test_an_ignored_rule_finds_nothing(padded: Path) -> None:
    assert [f.rule for f in verifier.check(padded).findings] == ["QC105"]
    assert verifier.check(padded, ignore="QC105").findings == ()
    assert verifier.check(padded, select="QC2").findings == ()


def test_a_selection_of_which_nothing_runs_is_unproven(call: Call) -> None:
    code, out, _ = call("check", QWEN_NVFP4, "--select", "QC501")
    assert code == 3
    assert "none of the selected rules ran" in out
    code, out, _ = call("check", QWEN_NVFP4, "--select", "QC101")  # there is no index
    assert code == 3
    assert "the selected rules found nothing to examine" in out
    assert call("check", QWEN_NVFP4, "--select", "QC501", "--depth", "payload")[0] == 0


def test_a_required_rule_that_is_not_selected_is_a_usage_error(call: Call) -> None:
    for argv in (
        ("--require", "QC501", "--ignore", "QC5"),
        ("--require", "QC5", "--select", "QC1"),
    ):
        code, out, err = call("check", QWEN_NVFP4, *argv)
        assert (code, out) == (2, "")
        assert "is required and" in err


def test_a_required_family_is_what_is_selected_of_it() -> None:
    selection = Selection(all_rules(), ignore="QC504", require="QC5")
    assert {"QC501", "QC502"} <= selection.required
    assert "QC504" not in selection.required


# the file


def test_the_nearest_file_upwards_is_read(project: Path) -> None:
    assert find(project) is None or project not in find(project).parents  # type: ignore[union-attr]
    outer = project.parent / "pyproject.toml"
    outer.write_text('[tool.ckptgate]\nselect = ["QC1"]\n')
    assert find(project) == outer
    (project / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert find(project) == outer
    (project / "pyproject.toml").write_text("[tool.ckptgate]\n")
    assert find(project) == project / "pyproject.toml"
    (project / "ckptgate.toml").write_text("")
    assert find(project) == project / "ckptgate.toml"
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    assert find(inner) == project / "ckptgate.toml"


def test_a_file_sets_what_check_does(call: Call, project: Path, padded: Path) -> None:
    assert call("check", padded)[0] == 0
    (project / "ckptgate.toml").write_text('fail_on = "warning"\n')
    code, out, _ = call("check", padded)
    assert code == 1
    assert f"configuration: {project / 'ckptgate.toml'}" in out
    (project / "ckptgate.toml").write_text('fail_on = "warning"\nignore = ["QC105"]\n')
    assert call("check", padded)[0] == 0
    (project / "ckptgate.toml").write_text('[severity]\nQC105 = "error"\n')
    assert call("check", padded)[0] == 1
    assert call("check", padded, "--no-config")[0] == 0
    other = project / "other.toml"
    other.write_text('profile = "strict"\n')
    assert call("check", padded, "--config", other)[0] == 1


def test_the_command_line_replaces_what_the_file_says(
    call: Call, project: Path, padded: Path
) -> None:
    (project / "ckptgate.toml").write_text(
        'fail_on = "warning"\nselect = ["QC2"]\nformats = ["json"]\n'
    )
    assert call("check", padded)[0] == 0
    code, out, _ = call("check", padded, "--select", "QC1")
    assert code == 1
    assert {c["rule"][:3] for c in json.loads(out)["coverage"] if c["ran"]} == {"QC1"}
    code, out, _ = call(
        "check", padded, "--select", "QC1", "--fail-on", "error", "--format", "text"
    )
    assert code == 0
    assert "verdict: PASSED at depth header (0 errors, 1 warning; 10 rules; " in out


def test_config_show_prints_every_value_and_where_it_comes_from(call: Call, project: Path) -> None:
    file = project / "pyproject.toml"
    file.write_text(
        '[tool.ckptgate]\nignore = ["QC106"]\nbaseline = "known.json"\n'
        'formats = ["text", "sarif=out/x.sarif"]\n'
        '[tool.ckptgate.severity]\nQC515 = { "*.w2.*" = "info" }\n'
    )
    code, out, err = call("config", "show", "--select", "QC5", "--select", "QC1")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert set(KEYS) < set(rows)
    assert rows["select"].endswith("command line")
    assert '["QC5", "QC1"]' in rows["select"]
    assert rows["ignore"].endswith(str(file))
    assert rows["fail_on"].endswith("default")
    code, out, _ = call("config", "show", "--json")
    shown = json.loads(out)
    assert shown["file"] == str(file)
    assert shown["settings"]["baseline"] == {
        "value": str(project / "known.json"),
        "origin": str(file),
    }
    assert shown["settings"]["formats"]["value"] == ["text", f"sarif={project / 'out' / 'x.sarif'}"]
    assert shown["settings"]["severity"]["value"] == {"QC515": {"*.w2.*": "info"}}
    code, out, _ = call("config", "show", "--no-config")
    assert "no file" in out
    assert str(file) not in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('selct = ["QC5"]', ("'selct'", "nearest: select")),
        ('fail-on = "warning"', ("'fail-on'", "nearest: fail_on")),
        ("[severities]\n", ("'severities'", "nearest: severity")),
        ('[tool.ckptgate]\nselect = ["QC5"]', ("'tool'", "at the top")),
        ('select = ["QC999"]', ("select", "'QC999'")),
        ('ignore = "QC5"', ("ignore",)),
        ("require = [3]", ("require",)),
        ('fail_on = "never"', ("fail_on", "error", "warning")),
        ('profile = "vlm"', ("profile", "nearest: vllm")),
        ('formats = ["sarfi"]', ("formats", "nearest: sarif")),
        ('[severity]\nQC999 = "info"', ("severity", "'QC999'")),
        ('[severity]\nQC105 = "off"', ("severity", "QC105")),
        ('[severity.QC105]\n"*" = "fatal"', ("severity", "QC105")),
        ('[severity]\n"QC1,QC2" = "info"', ("severity", "one rule")),
        ("baseline = 3", ("baseline",)),
        ('weights = "fold"', ("weights", "nearest: folded")),
        ("select = [", ("invalid TOML", "--no-config")),
        ("a = 1\na = 2", ("invalid TOML",)),
        ('profile = "\\u0000"', ("profile",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    call: Call, project: Path, text: str, words: tuple[str, ...]
) -> None:
    file = project / "ckptgate.toml"
    file.write_text(text)
    for command in (("check", QWEN_NVFP4), ("config", "show")):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "Traceback" not in err
        for word in (str(file), *words):
            assert word in err
    assert call("check", QWEN_NVFP4, "--no-config")[0] == 0


def test_weights_come_from_the_file_or_the_command_line(call: Call, project: Path) -> None:
    (project / "ckptgate.toml").write_text('weights = "folded"\n')
    _, out, _ = call("check", QWEN_NVFP4, "--format", "json")
    assert json.loads(out)["stats"]["options"]["weights"] == "folded"
    _, out, _ = call("check", QWEN_NVFP4, "--weights", "base", "--format", "json")
    assert json.loads(out)["stats"]["options"]["weights"] == "base"
    _, out, _ = call("check", QWEN_NVFP4, "--no-config", "--format", "json")
    assert "weights" not in json.loads(out)["stats"]["options"]
    code, _, err = call("check", QWEN_NVFP4, "--weights", "turned")
    assert code == 2
    assert "rotated" in err


def test_a_key_of_pyproject_is_named_with_its_table(project: Path) -> None:
    file = project / "pyproject.toml"
    file.write_text("[tool.ckptgate]\nprofiles = 'vllm'\n")
    with pytest.raises(
        UsageError, match=r"unknown key 'tool\.ckptgate\.profiles'; nearest: profile"
    ):
        load(file)
    file.write_text("[tool]\nckptgate = 3\n")
    with pytest.raises(UsageError, match="not a table"):
        load(file)
    file.write_text("[tool.other]\n")
    with pytest.raises(UsageError, match="has no"):
        load(file)


def test_a_config_that_is_not_there_or_contradicts(call: Call, project: Path) -> None:
    code, out, err = call("check", QWEN_NVFP4, "--config", project / "none.toml")
    assert (code, out) == (2, "")
    assert "none.toml" in err
    code, _, err = call("check", QWEN_NVFP4, "--config", "x", "--no-config")
    assert code == 2
    assert "not both" in err


def test_a_working_directory_that_is_gone(call: Call, project: Path) -> None:
    project.rmdir()
    code, out, err = call("check", QWEN_NVFP4, "--format", "json")
    assert (code, out) == (2, "")
    assert "--no-config" in err
    assert call("check", QWEN_NVFP4, "--no-config")[0] == 0


def test_the_library_reads_no_file(project: Path, padded: Path) -> None:
    (project / "ckptgate.toml").write_text('[severity]\nQC105 = "error"\n')
    assert verifier.check(padded).verdict == "passed"


def test_effective_values_keep_their_defaults(project: Path) -> None:
    assert {k: s.value for k, s in effective({}, None).items()} == asdict(Config())
    assert {s.origin for s in effective({"select": (), "profile": None}, None).values()} == {
        "default"
    }


def test_the_example_of_the_docs_is_a_configuration(project: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    file = project / "ckptgate.toml"
    file.write_text(example)
    assert all(s.origin == str(file) for s in effective({}, file).values())
    for profile in PROFILES:
        assert f"`{profile}`" in page or profile in example
