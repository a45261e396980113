# SPDX-License-Identifier: Apache-2.0
"""The options of every command, and what an interrupted command says."""

from __future__ import annotations

import importlib
import io

import pytest

from tests.paths import TESTS
from verifier.cli import run
from verifier.cli.terminal import Terminal

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
Capture = pytest.CaptureFixture[str]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("color", "environment", "screen", "colored"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"NO_COLOR": ""}, True, True),
        ("auto", {"FORCE_COLOR": "1"}, False, True),
        ("auto", {"FORCE_COLOR": "0"}, False, False),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ("auto", {"TERM": "dumb"}, True, False),
        ("always", {"NO_COLOR": "1"}, False, True),
        ("never", {"FORCE_COLOR": "1"}, True, False),
    ],
)
def test_colors(
    monkeypatch: pytest.MonkeyPatch,
    color: str,
    environment: dict[str, str],
    screen: bool,
    colored: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Screen() if screen else io.StringIO()
    assert Terminal(color=color).color_of(stream) is colored


@pytest.mark.parametrize("argv", [["check", "--color"], ["--color"]], ids=["after", "before"])
def test_a_report_is_colored_on_request(argv: list[str], capsys: Capture) -> None:
    where = ["check"] if argv == ["--color"] else []
    for value, colored in (("always", True), ("never", False)):
        assert run([*argv, value, *where, str(QWEN_NVFP4)]) == 0
        assert ("\x1b[" in capsys.readouterr().out) is colored


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(option: str, capsys: Capture) -> None:
    assert run([option]) == 0
    assert capsys.readouterr().out.startswith("ckptgate, version ")


def _interrupted(monkeypatch: pytest.MonkeyPatch, target: str, *argv: object) -> int:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module, _, name = target.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, stop)
    return run([str(a) for a in argv])


def test_an_interrupted_command_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: Capture
) -> None:
    check = ("check", QWEN_NVFP4)
    assert _interrupted(monkeypatch, "verifier.run.engine.open_checkpoint", *check) == 130
    assert capsys.readouterr().err.strip() == "ckptgate: interrupted; no report was written"
    monkeypatch.undo()
    export = ("export", QWEN, f"{tmp_path}/out", "--recipe", "nvfp4_experts_only")
    arguments = (*export, "--input-scale", "one")
    assert _interrupted(monkeypatch, "exporter.stream.write.write_shard", *arguments) == 130
    assert capsys.readouterr().err.strip() == (
        f"ckptgate: interrupted; finished shards are kept in {tmp_path}/.out.ckptgate-work; "
        "run the same command again to resume"
    )
