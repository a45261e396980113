# SPDX-License-Identifier: Apache-2.0
"""Every command in README and docs: it parses, and runs if it is cheap and needs no network; shown
output is the real output.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.acceptance import newcomer
from tests.paths import ROOT
from verifier.cli import cli
from verifier.selftest.editor import CheckpointEditor

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
QWEN_NVFP4 = ROOT / "tests" / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
PAGES = {
    str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
    for p in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "goldens" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
SESSIONS = ("docs/reports.md", "docs/configuration.md")
"""Pages whose indented blocks are sessions: commands after ``$ ``, each with its output."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
Done = subprocess.CompletedProcess[str]


def commands(page: str) -> Iterator[str]:
    """Yield the ``ckptgate`` command lines of a page, without comments."""
    page = re.sub(r" *\\\n\s*", " ", page)
    fenced = "\n".join(text for language, text in FENCE.findall(page) if language in SHELLS)
    indented = "\n".join(re.findall(r"^ {4}(\S.*)$", FENCE.sub("", page), re.M))
    for line in f"{fenced}\n{indented}".splitlines():
        line = line.removeprefix("$ ")
        if not line.startswith("ckptgate ") or re.search(r"…|\.\.\.|\[-", line):
            continue
        line = re.split(r"\s{2,}|\s+# ", line)[0]
        for part in re.split(r""";(?= )(?=(?:[^"]*"[^"]*")*[^"]*$)|\|\||>""", line):
            if part.strip().startswith("ckptgate "):
                yield part.strip().removeprefix("ckptgate ")


SHELLS = ("console", "bash", "shell", "sh")
ALL = sorted({(name, command) for name, page in PAGES.items() for command in commands(page)})


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p}: {c}"[:60] for p, c in ALL])
def test_every_documented_command_parses(page: str, line: str) -> None:
    command: click.Command = cli
    context: click.Context | None = None
    arguments = shlex.split(line)
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=command.name)
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None, name
        command = found
    command.make_context(command.name, list(arguments), parent=context)


def test_there_are_commands_on_every_page_that_describes_commands() -> None:
    described = {name for name, _ in ALL}
    assert len(ALL) > 60
    pages = ("export", "gate", "repair", "history")
    assert {"README.md", *(f"docs/{name}.md" for name in pages)} <= described


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with ckptgate and this Python as executables."""
    directory = tmp_path_factory.mktemp("bin")
    for name, module in (("ckptgate", "-m ckptgate"), ("python", "")):
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        script.chmod(0o755)
    return directory


def shell(command: str, directory: Path, tools: Path) -> Done:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", command],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


WALKS = {
    "docs/index.md": 9,
    "docs/find.md": 16,
    "docs/recipes.md": 4,
    "docs/large.md": 8,
    "docs/review.md": 9,
    "docs/add-a-format.md": 1,
}
"""Pages whose console blocks run in an empty folder, and how many commands each has."""


@pytest.mark.parametrize("page", WALKS)
def test_the_commands_of_a_page_run_in_an_empty_folder(
    page: str, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert newcomer.walk(PAGES[page], tmp_path) == WALKS[page]


def test_the_code_of_a_page_is_that_of_the_repository() -> None:
    files = ("verifier/schemes/formats.py", "verifier/decoding/floats.py")
    sources = [(ROOT / f).read_text() for f in (*files, "tests/formats/encoders.py")]
    blocks = [t for language, t in FENCE.findall(PAGES["docs/add-a-format.md"])]
    shown = [t for t in blocks if not t.startswith("$ ")]
    assert [sum(t in source for source in sources) for t in shown] == [1, 1, 1]


def test_a_newcomer_notices_what_a_page_does_not_show(tmp_path: Path) -> None:
    page = "```console\n$ printf 'a\\nb\\n'\n{}\n```\n"
    for shown in ("a\nb", "…\nb", "a\n…", "…"):
        assert newcomer.walk(page.format(shown), tmp_path) == 1
    for shown in ("a", "b", "a\nb\nc", "…\na"):
        with pytest.raises(AssertionError, match="printed:"):
            newcomer.walk(page.format(shown), tmp_path)
    assert newcomer.walk("```console\n$ echo no; false\nno\n```\n", tmp_path) == 1
    with pytest.raises(AssertionError, match="false"):
        newcomer.walk("```console\n$ false\n```\n", tmp_path)


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """Return a project with the checkpoint and the configuration that the pages describe."""
    checkpoint = Path(shutil.copytree(QWEN_NVFP4, tmp_path / "ckpt"))
    CheckpointEditor(checkpoint).drop(["model.layers.0.mlp.experts.2.up_proj.input_scale"])
    with (checkpoint / "model.safetensors").open("ab") as handle:
        handle.write(bytes(8))
    return tmp_path


# README


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tools: Path) -> Path:
    """Return a directory with the checkpoints and texts that README.md names."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "BF16").symlink_to(GOLDEN / "bf16")
    (directory / "VENDOR").symlink_to(GOLDEN / "mxfp8")
    lines = (GOLDEN / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (directory / "texts.jsonl").write_text("".join(lines[1:3]), encoding="utf-8")
    export = "ckptgate export BF16 OUT --recipe nvfp4_experts_only --onto VENDOR"
    done = shell(export, directory, tools)
    assert done.returncode == 0, done.stderr
    return directory


ELSEWHERE = r"^pip |://|ckptgate selftest"
"""Commands that need a network, or that other tests run."""


@pytest.mark.slow
def test_the_console_blocks_of_readme_run(project: Path, tools: Path) -> None:
    blocks = [text for language, text in FENCE.findall(README) if language == "console"]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    run = [line for line in lines if not re.search(ELSEWHERE, line)]
    assert len(run) > 15
    for line in run:
        done = shell(
            f"set -e; {line}".replace("diff OUT VENDOR;", "diff OUT VENDOR || true;"),
            project,
            tools,
        )
        # Two documents decide nothing: a gate over them is inconclusive.
        expected = (0, 3) if re.search("ckptgate (gate|compare) ", line) else (0,)
        assert done.returncode in expected, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (project / "report.html").is_file()


def test_the_python_block_of_readme_runs(project: Path) -> None:
    (text,) = [text for language, text in FENCE.findall(README) if language == "python"]
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    verdict, outcome = done.stdout.splitlines()
    assert verdict.startswith("passed 0 [")
    assert outcome in ("passed", "inconclusive")


CHEAP = {
    "docs/repair.md": r"repair BROKEN OUT",
    "docs/plugins.md": r"(check|explain) ",
    "docs/history.md": r"check |history log",
    "docs/reports.md": r"check ./ckpt --format",
}
"""Pages, and which of their commands run in a few seconds."""


@pytest.mark.parametrize("page", CHEAP)
def test_cheap_commands_of_a_page_run(page: str, project: Path, session: Path, tools: Path) -> None:
    for name in ("BROKEN", "M3-NVFP4"):
        (session / name).symlink_to(project / "OUT")
    (session / "REF").symlink_to(GOLDEN / "bf16")
    for language, text in FENCE.findall(PAGES[page]):
        if language == "python" and page == "docs/plugins.md":
            (session / "house_rules.py").write_text(text)
            break
    run = [line for line in commands(PAGES[page]) if re.match(CHEAP[page], line)]
    assert run
    for line in sorted(run, key=lambda line: "--dry-run" not in line):
        done = shell(f"ckptgate {line}", session, tools)
        assert (done.returncode in (0, 1), done.stderr) == (True, ""), f"{line}\n{done.stdout}"


def test_the_example_of_readme_shows_the_real_output() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_readme.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# pages with sessions


def sessions(page: str) -> list[list[tuple[str, list[str]]]]:
    """Return the indented blocks as lists of (command, shown output)."""
    found: list[list[tuple[str, list[str]]]] = []
    for block in re.findall(r"(?:^ {4}\S.*\n|^ {8,}\S.*\n)+", FENCE.sub("", page), re.M):
        steps: list[tuple[str, list[str]]] = []
        for line in block.splitlines():
            if line.startswith("    $ "):
                steps.append((line.removeprefix("    $ "), []))
            elif steps:
                steps[-1][1].append(line[4:])
        if steps:
            found.append(steps)
    return found


@pytest.mark.parametrize("page", SESSIONS)
def test_the_sessions_of_a_page_show_the_real_output(page: str, session: Path, tools: Path) -> None:
    if page == "docs/configuration.md":
        toml = next(text for language, text in FENCE.findall(PAGES[page]) if language == "toml")
        (session / "ckptgate.toml").write_text(toml)
    blocks = sessions(PAGES[page])
    assert blocks
    for steps in blocks:
        for command, shown in steps:
            if "baseline" in command:
                (session / "ckptgate.toml").unlink(missing_ok=True)
            done = shell(command, session, tools)
            assert done.returncode in (0, 1), done.stderr
            matches(done.stdout.replace(str(session), "/work/release").splitlines(), shown, command)


def _is_shown(line: str, shown: str) -> bool:
    return line.startswith(shown[:-1]) if shown.endswith("…") else line == shown


def matches(lines: list[str], shown: list[str], command: str) -> None:
    """Assert that the shown lines are the output; a line ``…`` stands for any number of lines, and
    ``…`` at the end of a line for the rest of it.
    """
    at = 0
    skip = False
    for line in shown:
        if line == "…":
            skip = True
            continue
        candidates = lines[at:] if skip else lines[at : at + 1]
        matching = [i for i, text in enumerate(candidates, at) if _is_shown(text, line)]
        assert matching, f"{command}: {line!r} is not printed: {lines[at:]}"
        at = matching[0] + 1
        skip = False
    assert skip or at == len(lines), f"{command}: also prints {lines[at:]}"
