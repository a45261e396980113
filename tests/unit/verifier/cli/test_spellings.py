# SPDX-License-Identifier: Apache-2.0
"""One spelling per thing; the former ones work for one release, with a warning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.paths import TESTS
from verifier.cli import run
from verifier.cli.main import cli
from verifier.cli.spellings import RenamedOptions

QWEN_NVFP4 = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
Capture = pytest.CaptureFixture[str]


def commands(
    group: click.Group = cli, ctx: click.Context | None = None, path: str = ""
) -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name."""
    ctx = click.Context(group, parent=ctx)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, ctx, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


COMMANDS = dict(commands())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["selftest", "--rule", "QC101", "--json"], "--json is now --format json;"),
        (["rules", "--json"], "--json is now --format json;"),
        (
            ["diff", str(QWEN_NVFP4), str(QWEN_NVFP4), "--payload"],
            "--payload is now --depth payload;",
        ),
        (["history", "log", "--file", "/nonexistent"], "--file is now --history;"),
        (["history", "log", "--file=/nonexistent"], "--file is now --history;"),
        (["score", "x", "--force", "-o", "y"], "--force is now --overwrite;"),
        (["gate", "x", "--base", "y", "--window", "9"], "--window is now --seq-len;"),
        (["gate", "x", "--base", "y", "--batch=2"], "--batch is now --batch-size;"),
        (["check", str(QWEN_NVFP4), "--window", "9"], "--window is now --seq-len;"),
        (["repair", "x", "y", "--base", "z", "--report", "r"], "--report is now --json-report;"),
    ],
)
def test_former_spellings_work_with_a_warning(argv: list[str], words: str, capsys: Capture) -> None:
    run(argv)
    err = capsys.readouterr().err
    assert err.startswith(f"ckptgate: {words} 0.3.0 will not know the old spelling\n")
    assert "No such option" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_former_spellings_are_not_in_the_help(name: str) -> None:
    command = COMMANDS[name]
    known = {spelling for param in command.params for spelling in param.opts}
    if isinstance(command, RenamedOptions):
        assert not known & command.renamed.keys()
    assert not known & {"--force", "--batch", "--payload", "--to", "--report", "--max-loss"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_options_of_every_command(name: str) -> None:
    known = {spelling for param in COMMANDS[name].params for spelling in param.opts}
    assert {"--color", "--progress", "--quiet", "--verbose"} <= known


def test_what_follows_two_dashes_is_no_option(tmp_path: Path, capsys: Capture) -> None:
    assert run(["diff", "--", str(QWEN_NVFP4), "--payload"]) == 2
    assert "is now" not in capsys.readouterr().err
