# SPDX-License-Identifier: Apache-2.0
"""`pytest --ckptgate` in processes of its own, as CI runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

import verifier
from tests.paths import ROOT
from verifier.rules import all_rules
from verifier.selftest.editor import CheckpointEditor

DATA = ROOT / "tests" / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
EXAMPLE = ROOT / "examples" / "ckptgate-example-rules" / "ckptgate_example_rules.py"
SCALE = "model.layers.1.mlp.experts.5.down_proj.weight_scale"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def session(tmp_path: Path) -> Run:
    """Return a function that runs pytest with the plugin in an empty folder."""

    def one(*argv: object, test: str = "", plugins: tuple[str, ...] = ()) -> Done:
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        (folder / "pytest.ini").write_text(
            "[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n"
        )
        if test:
            (folder / "test_mine.py").write_text(test)
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        names = [x for p in ("ckptgate.pytest_plugin", *plugins) for x in ("-p", p)]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *names, "-p", "no:cacheprovider", *map(str, argv)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment,
        )

    return one


@pytest.fixture
def copy(tmp_path: Path) -> CheckpointEditor:
    return CheckpointEditor(Path(shutil.copytree(QWEN_NVFP4, tmp_path / "copy")))


def counts(done: Done) -> dict[str, int]:
    """Return passed, failed and skipped of the last line."""
    return {
        what: int(n)
        for n, what in re.findall(
            r"(\d+) (passed|failed|skipped|error)", done.stdout.splitlines()[-1]
        )
    }


def test_the_entry_point_is_this_module() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "pytest11"
    ]
    assert points == {"ckptgate": "ckptgate.pytest_plugin"}


def test_installing_it_loads_nothing_heavy(session: Run) -> None:
    test = """
import sys
def test_light():
    heavy = {"numpy", "torch", "ml_dtypes", "transformers", "fsspec", "click", "pydantic"}
    heavy |= {"verifier.rules", "verifier.run"}
    assert not heavy & set(sys.modules)
    assert "verifier.pytest_plugin" in sys.modules
"""
    done = session(test=test)
    assert done.returncode == 0, done.stdout
    assert counts(done) == {"passed": 1}
    assert "ckptgate:" not in done.stdout


def test_a_sound_checkpoint_passes_rule_by_rule(session: Run) -> None:
    done = session(f"--ckptgate={QWEN_NVFP4}", "-v", "-rs")
    assert done.returncode == 0, done.stdout
    report = verifier.check(QWEN_NVFP4)
    ran = sum(c.ran for c in report.coverage)
    assert counts(done) == {"passed": ran + 1, "skipped": len(report.coverage) - ran}
    assert f"collected {len(all_rules()) + 1} items" in done.stdout
    assert f"ckptgate: {QWEN_NVFP4}, depth header" in done.stdout
    for covered in report.coverage:
        assert re.search(rf"::{covered.rule} {'PASSED' if covered.ran else 'SKIPPED'}", done.stdout)
    assert "needs --base or --merged-from" in done.stdout
    assert "depth payload" in done.stdout


def test_a_finding_fails_its_rule_and_the_verdict_only(
    session: Run, copy: CheckpointEditor
) -> None:
    copy.overwrite(SCALE, 12 * 4 + 3, b"\0")
    done = session(f"--ckptgate={copy.path}", f"--ckptgate-base={QWEN}", "--ckptgate-depth=payload")
    assert done.returncode == 1
    failed = set(re.findall(r"^FAILED \S*ckptgate::(\S+)", done.stdout, re.M))
    report = verifier.check(copy.path, base=QWEN, depth="payload")
    assert failed == {f.rule for f in report.findings if f.severity == "error"} | {"verdict"}
    assert f"{SCALE} [row 12, block 3, byte" in done.stdout
    assert "observed 0x00, expected 0x01..0x7E" in done.stdout
    assert "`ckptgate explain QC501`" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_required_rule_that_did_not_run_fails(session: Run) -> None:
    done = session(
        f"--ckptgate={QWEN_NVFP4}", "--ckptgate-require=QC605", "--ckptgate-require=QC301", "-rs"
    )
    assert done.returncode == 1
    assert counts(done)["failed"] == 2  # the rule and the verdict
    assert "QC605 is required and did not run: needs --depth payload" in done.stdout
    assert (
        "INCONCLUSIVE (QC605 is required and did not run: needs --depth payload); exit code 3"
        in done.stdout
    )
    payload = session(
        f"--ckptgate={QWEN_NVFP4}",
        "--ckptgate-require=QC605",
        "--ckptgate-depth=payload",
        "-k",
        "QC605",
    )
    assert payload.returncode == 1
    assert "did not run: needs --base or --merged-from" in payload.stdout
    based = session(
        f"--ckptgate={QWEN_NVFP4}",
        "--ckptgate-require=QC605",
        "--ckptgate-depth=payload",
        f"--ckptgate-base={QWEN}",
    )
    assert based.returncode == 0, based.stdout


def test_a_checkpoint_without_quantization_is_not_passed(session: Run) -> None:
    done = session(f"--ckptgate={QWEN}")
    assert done.returncode == 1
    assert counts(done)["failed"] == 1
    assert "INCONCLUSIVE (no quantized tensor)" in done.stdout


@pytest.mark.parametrize("role", ["", "-base"])
def test_a_folder_without_a_checkpoint_is_a_wrong_call(
    session: Run, tmp_path: Path, role: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = session(f"--ckptgate={QWEN_NVFP4}", f"--ckptgate{role}={empty}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{empty}: the directory is empty" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ckptgate=/nonexistent/folder"], "/nonexistent/folder: no such directory"),
        (
            [f"--ckptgate={QWEN_NVFP4}", "--ckptgate-base=/nonexistent/folder"],
            "/nonexistent/folder: no such directory",
        ),
        ([f"--ckptgate={QWEN_NVFP4}", "--ckptgate-require=QC999"], "unknown rule 'QC999'"),
        (
            [f"--ckptgate={QWEN_NVFP4}", "--ckptgate-plugin=/nonexistent.py"],
            "/nonexistent.py: no such file",
        ),
        (["--ckptgate-depth=payload"], "--ckptgate-depth needs --ckptgate PATH"),
        (["--ckptgate-merged-from=x"], "--ckptgate-merged-from needs --ckptgate PATH"),
    ],
)
def test_a_wrong_call_ends_before_anything_runs(session: Run, argv: list[str], words: str) -> None:
    done = session(*argv)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {words}" in done.stderr
    assert "Traceback" not in done.stderr


def test_warnings_fail_where_asked(session: Run, tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text(EXAMPLE.read_text().replace('severity="error"', 'severity="warning"'))
    argv = (f"--ckptgate={QWEN_NVFP4}", f"--ckptgate-plugin={rules}")
    mild = session(*argv, "-rP")
    assert mild.returncode == 0, mild.stdout
    assert "warning ACME101  no LICENSE next to the weights" in mild.stdout
    strict = session(*argv, "--ckptgate-fail-on=warning")
    assert strict.returncode == 1
    assert set(re.findall(r"^FAILED \S*ckptgate::(\S+)", strict.stdout, re.M)) == {
        "ACME101",
        "verdict",
    }


def test_the_rules_of_a_file_are_tests(session: Run) -> None:
    done = session(
        f"--ckptgate={QWEN_NVFP4}", f"--ckptgate-plugin={EXAMPLE}", "-k", "ACME101 or QC301"
    )
    assert counts(done) == {"failed": 1, "passed": 1}
    assert "no LICENSE next to the weights" in done.stdout


def test_fixtures(session: Run, copy: CheckpointEditor) -> None:
    copy.drop([SCALE])
    test = f"""
import pytest
def test_report(ckptgate_report):
    assert ckptgate_report.verdict == "passed"
    assert ckptgate_report.summary.contents.tensors == 213
def test_same(assert_same_layout):
    assert_same_layout({str(QWEN_NVFP4)!r}, {str(QWEN_NVFP4)!r})
def test_other(assert_same_layout):
    with pytest.raises(AssertionError, match="{SCALE}"):
        assert_same_layout({str(QWEN_NVFP4)!r}, {str(copy.path)!r})
def test_fails(assert_same_layout):
    assert_same_layout({str(QWEN_NVFP4)!r}, {str(copy.path)!r})
"""
    done = session(f"--ckptgate={QWEN_NVFP4}", "-k", "test_mine", test=test)
    assert counts(done) == {"passed": 3, "failed": 1}
    assert "only in A: 1 tensor" in done.stdout
    alone = session("-rs", test=test)
    assert counts(alone) == {"passed": 2, "failed": 1, "skipped": 1}
    assert "needs --ckptgate PATH" in alone.stdout


def test_junit_has_the_findings_and_what_was_examined(
    session: Run, copy: CheckpointEditor, tmp_path: Path
) -> None:
    copy.drop([SCALE])
    done = session(f"--ckptgate={copy.path}", f"--junitxml={tmp_path / 'junit.xml'}")
    assert done.returncode == 1
    cases = {c.get("name"): c for c in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}  # noqa: S314  (ours)
    assert set(cases) == {*all_rules(), "verdict"}
    assert SCALE in (cases["QC302"].findtext("failure") or "")
    covered = {c.rule: c for c in verifier.check(copy.path).coverage}["QC302"]
    found = cases["QC302"].find("properties/property")
    assert found is not None
    assert found.get("value") == f"{covered.checked} of {covered.of} {covered.unit}"


def test_the_check_runs_once(session: Run, tmp_path: Path) -> None:
    rules, log = tmp_path / "rules.py", tmp_path / "log"
    count = f"    open({str(log)!r}, 'a').write('x')\n    ctx.tally.see()\n"
    rules.write_text(EXAMPLE.read_text().replace("    ctx.tally.see()\n", count))
    session(f"--ckptgate={QWEN_NVFP4}", f"--ckptgate-plugin={rules}")
    assert log.read_text() == "x"


def test_collecting_reads_nothing(session: Run, copy: CheckpointEditor) -> None:
    (copy.path / "model.safetensors").write_bytes(b"\xff" * 100)
    done = session(f"--ckptgate={copy.path}", "--collect-only", "-q")
    assert done.returncode == 0
    assert "ckptgate::QC501" in done.stdout
    assert "ckptgate::verdict" in done.stdout


def test_workers_share_nothing_and_agree(session: Run) -> None:
    pytest.importorskip("xdist")
    done = session(
        f"--ckptgate={QWEN_NVFP4}", "-n", "2", "--dist", "loadgroup", plugins=("xdist.plugin",)
    )
    assert done.returncode == 0, done.stdout
    assert counts(done) == counts(session(f"--ckptgate={QWEN_NVFP4}"))
