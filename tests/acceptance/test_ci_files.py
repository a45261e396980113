# SPDX-License-Identifier: Apache-2.0
"""The files for CI, run as the services run them: the action's script, the hook, and every example
of docs/ci.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.paths import ROOT
from verifier.cli import run
from verifier.cli.pre_commit import WORST, checkpoints
from verifier.errors import EXIT_CODES
from verifier.selftest.editor import CheckpointEditor

DATA = ROOT / "tests" / "data" / "modelopt"
BASE, SOUND = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
SCALE = "model.layers.1.mlp.experts.5.down_proj.weight_scale"
PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
Done = subprocess.CompletedProcess[str]


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def documents() -> dict[str, Any]:
    """Return the YAML examples by the file name in their first line."""
    return {t.splitlines()[0].removeprefix("# "): yaml.safe_load(t) for t in blocks("yaml")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a repository with the paths that the examples use; `ckptgate` on its PATH is this code,
    pip does nothing.
    """
    folder = tmp_path / "project"
    for place, source in {
        "models/m3-nvfp4": SOUND,
        "releases/last": SOUND,
        "out/m3-nvfp4": SOUND,
        "out/m3-bf16": BASE,
    }.items():
        shutil.copytree(source, folder / place)
    (folder / "pytest.ini").write_text("[pytest]\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "ckptgate": f'exec {shlex.quote(sys.executable)} -m ckptgate "$@"',
        "pytest": f'exec {shlex.quote(sys.executable)} -m pytest "$@"',
        "pip": "exit 0",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    return folder


def shell(project: Path, command: str, **environment: object) -> Done:
    """Run a command as a runner does: bash that stops at the first error."""
    path = os.pathsep.join([str(project.parent / "bin"), os.environ["PATH"]])
    given = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "ckptgate.pytest_plugin",
        **{k: str(v) for k, v in environment.items()},
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=given,
    )


def damage(folder: Path, byte: bytes = b"\0") -> None:
    """Give a block scale another byte."""
    CheckpointEditor(folder).overwrite(SCALE, 51, byte)


# the examples


def test_every_example_is_one_that_is_run_below() -> None:
    assert set(documents()) == {
        ".github/workflows/checkpoint.yml",
        ".github/workflows/checkpoint-plain.yml",
        ".gitlab-ci.yml",
        ".pre-commit-config.yaml",
    }
    assert [name for name, _ in BLOCKS if name != "yaml"] == ["makefile", "shell", "python"]


EXAMPLES = {
    "github/checkpoint.yml": ".github/workflows/checkpoint.yml",
    "github/checkpoint-plain.yml": ".github/workflows/checkpoint-plain.yml",
    "gitlab/gitlab-ci.yml": ".gitlab-ci.yml",
    "pre-commit/pre-commit-config.yaml": ".pre-commit-config.yaml",
    "make/Makefile": "makefile",
    "pytest/test_release.py": "python",
}
"""The files of examples/ that the page shows, and the block that each is."""


@pytest.mark.parametrize("file", EXAMPLES)
def test_the_page_shows_the_examples_as_they_are(file: str) -> None:
    text = (ROOT / "examples" / file).read_text()
    shown = [block for _, block in BLOCKS if block in text]
    name = EXAMPLES[file]
    assert len(shown) == 1
    assert shown[0].startswith(f"# {name}\n") or name in ("makefile", "python")


def test_every_example_is_listed_and_has_no_placeholder() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    for file in (ROOT / "examples").rglob("*"):
        known = "ckptgate-example-rules" in file.parts or file.name == "README.md"
        if file.is_file() and not known and "__pycache__" not in file.parts:
            assert f"({file.relative_to(ROOT / 'examples')})" in page
            assert "your-org" not in file.read_text()
    assert "your-org" not in PAGE


def test_the_python_script(project: Path) -> None:
    script = shlex.quote(str(ROOT / "examples" / "python" / "check_release.py"))
    line = f"{shlex.quote(sys.executable)} {script} models/m3-nvfp4 out/m3-bf16"
    done = shell(project, line)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr
    damage(project / "models/m3-nvfp4")
    done = shell(project, line)
    assert done.returncode == 1
    assert "QC501: zero block scales" in done.stdout
    assert "  fix: Clamp the scale to 2^-9" in done.stdout


def test_the_page_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d) [\w ]+ \|", PAGE, re.M)}
    assert listed == {c for c in EXIT_CODES if c < 10}


def test_a_job_that_lets_inconclusive_pass(project: Path) -> None:
    command = next(c for c in re.findall(r"`(ckptgate check [^`]*)`", PAGE) if "||" in c)
    assert shell(project, command, CHECKPOINT="out/m3-bf16").returncode == 0
    assert shell(project, command, CHECKPOINT="models/m3-nvfp4").returncode == 0
    assert shell(project, command, CHECKPOINT="nothing").returncode != 0
    (project / "models/m3-nvfp4/config.json").write_text("{")
    assert shell(project, command, CHECKPOINT="models/m3-nvfp4").returncode != 0


def test_the_workflow_uses_the_action_as_it_is() -> None:
    steps = documents()[".github/workflows/checkpoint.yml"]["jobs"]["ckptgate"]["steps"]
    step = next(s for s in steps if s.get("uses", "").endswith("/ckptgate"))
    assert set(step["with"]) <= set(ACTION["inputs"])
    required = {k for k, v in ACTION["inputs"].items() if v.get("required")}
    assert required <= set(step["with"])
    used = re.findall(rf"steps\.{step['id']}\.outputs\.([\w-]+)", json.dumps(steps))
    assert set(used) <= set(ACTION["outputs"])
    upload = next(s for s in steps if "upload-artifact" in s.get("uses", ""))
    assert upload["if"] == "always()"


def test_the_plain_workflow(project: Path) -> None:
    job = documents()[".github/workflows/checkpoint-plain.yml"]["jobs"]["ckptgate"]
    summary = project / "summary.md"
    commands = "\n".join(s["run"] for s in job["steps"] if "run" in s)
    done = shell(project, commands, **job["env"], GITHUB_STEP_SUMMARY=summary)
    assert done.returncode == 0, done.stderr
    assert "passed" in summary.read_text()
    CheckpointEditor(project / job["env"]["CHECKPOINT"]).drop([SCALE])
    done = shell(project, commands, **job["env"], GITHUB_STEP_SUMMARY=summary)
    assert done.returncode == 1
    assert "::error" in done.stdout
    assert "QC302" in summary.read_text()


def test_the_gitlab_job(project: Path) -> None:
    job = documents()[".gitlab-ci.yml"]["ckptgate"]
    commands = "\n".join(job["script"])
    done = shell(project, commands, **job["variables"])
    assert done.returncode == 0, done.stderr
    CheckpointEditor(project / job["variables"]["CHECKPOINT"]).drop([SCALE])
    assert shell(project, commands, **job["variables"]).returncode == 1
    assert "QC302" in (project / job["artifacts"]["reports"]["junit"]).read_text()
    assert json.loads((project / job["artifacts"]["paths"][0]).read_text())["verdict"] == "failed"
    assert job["retry"]["exit_codes"] == [4]


def test_the_makefile(project: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (project / "Makefile").write_text(blocks("makefile")[0])
    stamp = project / "out/m3-nvfp4.passed"
    damage(project / "out/m3-nvfp4")
    done = shell(project, "make release")
    assert done.returncode == 2
    assert "QC501" in done.stdout
    assert not stamp.exists()
    damage(project / "out/m3-nvfp4", CheckpointEditor(SOUND).read(SCALE)[51:52])
    done = shell(project, "make release")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stamp.exists()
    assert "ready to ship out/m3-nvfp4" in done.stdout


def test_the_pytest_line(project: Path) -> None:
    line = blocks("shell")[0].strip()
    done = shell(project, line, CHECKPOINT="models/m3-nvfp4")
    assert done.returncode == 0, done.stdout
    assert (project / "ckptgate.xml").is_file()
    damage(project / "models/m3-nvfp4")
    done = shell(project, line, CHECKPOINT="models/m3-nvfp4")
    assert done.returncode == 1
    assert "FAILED ckptgate::QC501" in done.stdout


def test_the_tests_of_the_page(project: Path) -> None:
    (project / "test_release.py").write_text(blocks("python")[0])
    line = "pytest --ckptgate=models/m3-nvfp4 -k test_release"
    done = shell(project, line)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    CheckpointEditor(project / "releases/last").drop([SCALE])
    done = shell(project, line)
    assert done.returncode == 1
    assert "only in A: 1 tensor\n" in done.stdout


# the hook

HOOK = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]


def hook(project: Path, *args: str, files: list[str]) -> Done:
    """Run the hook as pre-commit does: entry, args, then the staged files that its pattern
    takes.
    """
    taken = [f for f in files if re.search(HOOK["files"], f)]
    line = shlex.join([*args, *taken])
    return shell(
        project, f"{HOOK['entry'].replace('python', shlex.quote(sys.executable), 1)} {line}"
    )


def test_the_hook_that_the_page_names() -> None:
    entry = documents()[".pre-commit-config.yaml"]["repos"][0]["hooks"][0]
    assert entry["id"] == HOOK["id"]
    assert {"id", "name", "entry", "language"} <= set(HOOK)
    assert HOOK["require_serial"] is True


@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("models/a/model-00001-of-00002.safetensors", True),
        ("config.json", True),
        ("a/hf_quant_config.json", True),
        ("a/model.safetensors.index.json", True),
        ("a/my_config.json", False),
        ("a/config.json.bak", False),
        ("a/model.bin", False),
        ("safetensors.py", False),
    ],
)
def test_which_files_the_hook_takes(file: str, taken: bool) -> None:
    assert bool(re.search(HOOK["files"], file)) is taken


def test_the_hook_judges_each_folder_once(project: Path) -> None:
    args = documents()[".pre-commit-config.yaml"]["repos"][0]["hooks"][0]["args"]
    files = [f"models/m3-nvfp4/{f.name}" for f in (project / "models/m3-nvfp4").iterdir()]
    done = hook(project, *args, files=[*files, "docs/config.json"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("verdict: PASSED") == 1
    damage(project / "models/m3-nvfp4")
    assert hook(project, files=files).returncode == 0  # a header check reads no scale
    done = hook(project, "--depth", "payload", files=files)
    assert done.returncode == 1
    assert "QC501" in done.stdout


def test_the_hook_ends_with_the_worst_code(project: Path) -> None:
    both = ["out/m3-bf16/config.json", "models/m3-nvfp4/config.json"]
    done = hook(project, files=both)
    assert done.returncode == 0
    assert "skipped: nothing in it is quantized" in done.stdout
    assert hook(project, "--require-quantized", files=both).returncode == 3
    CheckpointEditor(project / "models/m3-nvfp4").drop([SCALE])
    assert hook(project, files=both).returncode == 1
    assert hook(project, "--depth", "abyss", files=both).returncode == 2
    assert set(WORST) == {c for c in EXIT_CODES if 0 < c < 10}


def test_the_hook_judges_nothing_where_there_is_nothing(project: Path) -> None:
    (project / "app").mkdir()
    (project / "app/config.json").write_text("{}")
    done = hook(project, files=["app/config.json"])
    assert (done.returncode, done.stdout) == (0, "")
    assert checkpoints(["app/config.json"]) == []


def test_a_pointer_of_git_lfs_is_inconclusive(project: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 685952\n"
    (project / "models/m3-nvfp4/model.safetensors").write_text(text)
    done = hook(project, files=["models/m3-nvfp4/model.safetensors"])
    assert done.returncode == 3
    assert "is a Git LFS pointer; `git lfs pull` downloads the tensors" in done.stdout


# the action


def action(project: Path, **inputs: object) -> tuple[Done, dict[str, str], str]:
    """Run the step that checks, its environment filled from inputs as the runner does; return
    outputs and summary.
    """
    step = ACTION["runs"]["steps"][1]
    given = {k: str(v.get("default", "")) for k, v in ACTION["inputs"].items()} | {
        k.replace("_", "-"): str(v) for k, v in inputs.items()
    }
    context = {f"inputs.{k}": v for k, v in given.items()} | {
        "github.action_path": str(ROOT),
        "runner.temp": str(project.parent / "runner"),
    }
    tool = project.parent / "runner/ckptgate/bin/ckptgate"
    tool.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(project.parent / "bin/ckptgate", tool)
    environment = {
        k: re.sub(r"\$\{\{ (\S+) \}\}", lambda m: context[m[1]], str(v))
        for k, v in step["env"].items()
    }
    output, summary = project / "output.txt", project / "summary.md"
    for file in (output, summary):
        file.write_text("")
    done = shell(
        project, step["run"], **environment, GITHUB_OUTPUT=output, GITHUB_STEP_SUMMARY=summary
    )
    pairs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return done, pairs, summary.read_text()


@pytest.mark.parametrize(
    ("install", "expected"),
    [
        ("", [str(ROOT)]),
        ("ckptgate[report]==0.1 house-rules", ["ckptgate[report]==0.1", "house-rules"]),
    ],
)
def test_what_the_action_installs(project: Path, install: str, expected: list[str]) -> None:
    log = project / "log"
    fake = f'#!/bin/sh\nprintf "%s\\n" "$@" >> {shlex.quote(str(log))}\n'
    (project.parent / "bin/python").write_text(
        f'{fake}mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n'
    )
    (project.parent / "bin/python").chmod(0o755)
    step = ACTION["runs"]["steps"][0]
    done = shell(
        project,
        step["run"],
        CKPTGATE_INSTALL=install,
        CKPTGATE_ACTION=ROOT,
        RUNNER_TEMP=project.parent / "runner",
    )
    assert done.returncode == 0, done.stderr
    words = log.read_text().splitlines()
    assert words[:3] == ["-m", "venv", str(project.parent / "runner/ckptgate")]
    assert words[3:7] == ["-m", "pip", "install", "--quiet"]
    assert words[7:] == expected


def test_the_action_hands_every_input_over() -> None:
    text = json.dumps(ACTION["runs"]["steps"])
    for name in ACTION["inputs"]:
        assert f"${{{{ inputs.{name} }}}}" in text, name
    assert not [s for s in ACTION["runs"]["steps"] if "${{" in s["run"]], (
        "an input inside a script is run as code"
    )
    script = (ROOT / "tools/action.sh").read_text()
    for name in ACTION["runs"]["steps"][1]["env"]:
        assert name == "CKPTGATE_ACTION" or name in script, name
    assert {o["value"] for o in ACTION["outputs"].values()} == {
        f"${{{{ steps.check.outputs.{name} }}}}" for name in ACTION["outputs"]
    }


def test_the_action_on_a_sound_checkpoint(project: Path) -> None:
    done, outputs, summary = action(
        project, uri="models/m3-nvfp4", depth="payload", require="QC501 QC502"
    )
    assert done.returncode == 0, done.stderr
    assert outputs == {"verdict": "passed", "exit-code": "0", "report": "ckptgate-report.json"}
    assert json.loads((project / outputs["report"]).read_text())["stats"]["options"]["require"] == [
        "QC501",
        "QC502",
    ]
    assert "passed" in summary
    assert "verdict: PASSED" in done.stdout


def test_the_action_ends_with_the_code_after_the_summary(project: Path) -> None:
    damage(project / "models/m3-nvfp4")
    done, outputs, summary = action(
        project, uri="models/m3-nvfp4", depth="payload", base="out/m3-bf16", args="--no-config"
    )
    assert done.returncode == 1
    assert outputs == {"verdict": "failed", "exit-code": "1", "report": "ckptgate-report.json"}
    assert "QC501" in summary
    assert "::error" in done.stdout
    assert SCALE in done.stdout


@pytest.mark.parametrize(
    ("inputs", "code", "verdict"),
    [
        ({"uri": "out/m3-bf16"}, 3, "inconclusive"),
        ({"uri": "nothing"}, 2, "usage"),
        ({"uri": "models/m3-nvfp4", "require": "QC999"}, 2, "usage"),
        ({"uri": "--help"}, 2, "usage"),
    ],
)
def test_the_action_hands_every_code_on(
    project: Path, inputs: dict[str, str], code: int, verdict: str
) -> None:
    done, outputs, summary = action(project, **inputs)
    assert done.returncode == code
    assert (outputs["verdict"], outputs["exit-code"]) == (verdict, str(code))
    assert verdict in summary
    assert ("report" in outputs) == (code != 2)


def test_a_name_in_a_checkpoint_is_no_command_of_the_runner(project: Path) -> None:
    CheckpointEditor(project / "models/m3-nvfp4").add(
        "::error::owned\n::add-mask::x.weight", np.zeros((2, 16), np.uint8)
    )
    done, _, _ = action(project, uri="models/m3-nvfp4")
    assert done.returncode == 1
    token = re.search(r"^::stop-commands::(ckptgate-[0-9a-f]{32})$", done.stdout, re.M)
    assert token is not None
    before, _, rest = done.stdout.partition(token[0])
    inside, _, after = rest.partition(f"::{token[1]}::")
    assert "owned" in inside
    assert not re.search(r"^\s*::(error::owned|add-mask)", before + after, re.M)


def test_the_hooks_command_is_a_way_into_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--depth", "--require", "--fail-on"):
        assert option in text
