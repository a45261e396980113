# SPDX-License-Identifier: Apache-2.0
"""diff, stats, show and doctor as a person and a script see them: exit codes, one message, valid
JSON, cheap help.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.paths import TESTS
from verifier.cli import run
from verifier.cli.main import BUILT_IN

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, LLAMA_MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
COMMANDS = ("diff", "doctor", "show", "stats")
EXPERT = "model.layers.1.mlp.experts.5.down_proj"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs a command line and returns exit code, stdout and stderr."""

    def one(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return one


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command: str) -> None:
    assert command in BUILT_IN
    done = python("-X", "importtime", "-m", "verifier", command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: ckptgate {command}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "verifier.cli.main" in imported
    assert not {"torch", "transformers"} & imported


@pytest.mark.parametrize(
    "argv",
    [
        ("diff", QWEN, QWEN_NVFP4, "--depth", "payload"),
        ("stats", QWEN_NVFP4, "--depth", "payload"),
        ("show", QWEN_NVFP4, EXPERT),
    ],
    ids=lambda a: a[0],
)
def test_looking_imports_no_torch(argv: tuple[object, ...]) -> None:
    done = python("-X", "importtime", "-m", "verifier", *map(str, argv))
    assert done.returncode == (1 if argv[0] == "diff" else 0)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not {"torch", "transformers", "exporter", "fsspec"} & imported


@pytest.mark.parametrize(
    "line",
    [
        "diff {no} {ok}",
        "diff {ok} {no}",
        "stats {no}",
        "show {no} x",
        "show {ok} lm_head --base {no}",
    ],
)
@pytest.mark.parametrize("format_", ["text", "json"])
def test_a_missing_folder_is_a_wrong_call(
    call: Call, tmp_path: Path, line: str, format_: str
) -> None:
    argv = [w.format(no=tmp_path / "missing", ok=QWEN) for w in line.split()]
    code, out, err = call(*argv, "--format", format_)
    assert (code, out) == (2, "")
    assert err == f"ckptgate: {tmp_path / 'missing'}: no such directory\n"


@pytest.mark.parametrize("line", ["diff {no} {ok}", "diff {ok} {no}", "stats {no}", "show {no} x"])
def test_a_folder_without_a_checkpoint_is_a_wrong_call(
    call: Call, tmp_path: Path, line: str
) -> None:
    argv = [w.format(no=tmp_path, ok=QWEN) for w in line.split()]
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"ckptgate: {tmp_path}: the directory is empty")


@pytest.mark.parametrize("line", ["show {ok} x"])
def test_contents_that_do_not_allow_it_are_exit_1(call: Call, tmp_path: Path, line: str) -> None:
    argv = [w.format(no=tmp_path, ok=QWEN) for w in line.split()]
    code, out, err = call(*argv)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    code, out, quiet = call(*argv, "--format", "json")
    assert (code, quiet) == (1, "")
    assert err == f"ckptgate: {json.loads(out)['error']}\n"


def test_diff_ends_with_whether_they_differ(call: Call) -> None:
    assert call("diff", LLAMA, LLAMA, "--depth", "payload")[0] == 0
    code, out, err = call("diff", LLAMA, LLAMA_MXFP8)
    assert (code, err) == (1, "")
    assert re.search(r"^  attention +8 BF16 → 8 MXFP8$", out, re.M)
    value = json.loads(call("diff", LLAMA, LLAMA_MXFP8, "--format", "json")[1])
    assert {"role": "mlp", "format": "MXFP8", "a": 0, "b": 6} in value["precision"]


def test_stats_and_show_judge_nothing(call: Call, tmp_path: Path) -> None:
    """A zero scale is a fact to these two, and a finding of `check` alone."""
    copy = Path(shutil.copytree(QWEN_NVFP4, tmp_path / "copy"))
    code, out, _ = call(
        "show", copy, f"{EXPERT}.weight_scale", "--row", 12, "--block", 3, "--format", "json"
    )
    assert code == 0
    place = next(s["byte"] for s in json.loads(out)["scales"] if s["leaf"] == "weight_scale")
    with (copy / "model.safetensors").open("r+b") as handle:
        handle.seek(place)
        handle.write(b"\0")
    code, report, _ = call("check", copy, "--depth", "payload")
    assert code == 1
    line = next(
        x.strip() for x in report.splitlines() if f"{EXPERT}.weight_scale [row 12, block 3" in x
    )
    code, out, err = call("show", copy, line, "--base", QWEN)
    assert (code, err) == (0, "")
    assert re.search(r"weight_scale +0x00 +0  at byte", out)
    assert "expected weight_scale 0x" in out
    code, out, err = call("stats", copy, "--depth", "payload")
    assert (code, err) == (0, "")
    assert "<0.01% zero" in out or "0.01% zero" in out


def test_everything_works_behind_an_address(call: Call) -> None:
    system = fsspec.filesystem("memory")
    for folder in (QWEN, QWEN_NVFP4):
        system.put(f"{folder}/", f"/ckptgate-understand/{folder.name}/", recursive=True)
    try:
        base, candidate = (f"memory://ckptgate-understand/{f.name}" for f in (QWEN, QWEN_NVFP4))
        assert call("diff", candidate, QWEN_NVFP4, "--depth", "payload")[0] == 0
        assert call("diff", base, candidate)[0] == 1
        near, far = (call("stats", u, "--depth", "payload") for u in (QWEN_NVFP4, candidate))
        assert near[1].splitlines()[1:] == far[1].splitlines()[1:]
        near, far = (
            call("show", u, EXPERT, "--row", 3, "--base", b)
            for u, b in ((QWEN_NVFP4, QWEN), (candidate, base))
        )
        assert near == far
    finally:
        system.rm("/ckptgate-understand", recursive=True)


@pytest.mark.parametrize(
    "argv", [("diff", QWEN, QWEN_NVFP4), ("stats", QWEN_NVFP4), ("show", QWEN_NVFP4, EXPERT)]
)
def test_a_reader_that_closes_the_pipe_changes_no_exit_code(argv: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        line = [sys.executable, "-m", "verifier", *map(str, argv)]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1 if argv[0] == "diff" else 0, "")
