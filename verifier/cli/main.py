# SPDX-License-Identifier: Apache-2.0
"""The root command: lazily imported commands, and the one place that turns errors into a message
and an exit code.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from verifier import __version__
from verifier.cli.terminal import (
    TERMINAL_OPTIONS,
    add_terminal_options,
    ended,
    on_interrupt,
)
from verifier.errors import CkptgateError
from verifier.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUILT_IN = {
    "baseline": (
        "verifier.cli.baseline",
        "Accept known findings, so that a check fails on new ones only.",
    ),
    "check": ("verifier.cli.check", "Check a checkpoint."),
    "compare": ("verifier.cli.gate", "Compare a candidate's run with its base's run."),
    "config": ("verifier.cli.config", "Show the effective configuration."),
    "diff": (
        "verifier.cli.diff",
        "Compare two checkpoints: names, dtypes, shapes, configs.",
    ),
    "doctor": (
        "verifier.cli.doctor",
        "Show the environment: versions, extras, what each enables.",
    ),
    "explain": ("verifier.cli.rules", "Explain a rule: cause, impact, fix."),
    "gate": ("verifier.cli.gate", "Test a candidate's loss over its base against a margin."),
    "goldens": ("verifier.cli.goldens", "Review and accept golden records."),
    "history": ("verifier.cli.history", "Record runs; show trends and change points."),
    "manifest": ("verifier.cli.manifest", "Compare published files with an export's manifest."),
    "merge-reports": (
        "verifier.cli.merge_reports",
        "Merge the JSON reports of a check that ran in subsets.",
    ),
    "report": ("verifier.cli.report", "Render runs and history as one HTML page."),
    "rules": ("verifier.cli.rules", "List the rules."),
    "score": ("verifier.cli.gate", "Score a checkpoint once, to compare later."),
    "selftest": (
        "verifier.cli.selftest",
        "Verify every rule: inject known defects and expect findings.",
    ),
    "show": (
        "verifier.cli.show",
        "Inspect one block: raw bytes, scale, decoded values, expected values.",
    ),
    "stats": ("verifier.cli.stats", "Count formats, bits per parameter and scale values."),
}
"""Command -> (module, help). ``--help`` imports none of these modules."""
HIDDEN = {"pre-commit": "verifier.cli.pre_commit"}


class LazyGroup(click.Group):
    """A group that imports a command when it runs; the help of built-in commands is in the
    table.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all command names, sorted."""
        return sorted({*BUILT_IN, *(e.name for e in entry_points(group="ckptgate.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        module = HIDDEN.get(cmd_name) or BUILT_IN.get(cmd_name, ("", ""))[0]
        if module:
            command: click.Command = getattr(
                importlib.import_module(module), cmd_name.replace("-", "_")
            )
            add_terminal_options(command)
            return command
        for entry in entry_points(group="ckptgate.commands", name=cmd_name):
            loaded: click.Command = entry.load()
            add_terminal_options(loaded)
            return loaded
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing the built-in ones."""
        rows = []
        for name in self.list_commands(ctx):
            if name in BUILT_IN:
                rows.append((name, BUILT_IN[name][1]))
            else:
                command = self.get_command(ctx, name)
                rows.append((name, command.get_short_help_str(80) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="ckptgate")
def cli() -> None:
    """Validate quantized LLM checkpoints before you ship them.

    Exit codes: 0 passed, 1 failed, 2 usage error, 3 inconclusive, 4 I/O or internal error; see
    docs/exit-codes.md.
    """


cli.params += TERMINAL_OPTIONS


def run(argv: Sequence[str]) -> int:
    """Run a command line in this process and return its exit code; messages go to stderr."""
    on_interrupt("")
    try:
        result = cli.main(args=list(argv), prog_name="ckptgate", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _fail(ended("interrupted"), INTERRUPTED)
    except CkptgateError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if wants_traceback(error):
            raise
        return _fail(explain_failure(error), 4)


def wants_traceback(error: Exception) -> bool:
    """Whether an error is an internal one and $CKPTGATE_DEBUG asks for its traceback."""
    return not isinstance(error, CkptgateError | OSError | MemoryError) and bool(
        os.environ.get("CKPTGATE_DEBUG")
    )


def explain_failure(error: Exception) -> str:
    """Return an I/O error or an internal error in one line."""
    if isinstance(error, CkptgateError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            message = "no space left on the disk"
        else:
            message = error.strerror or str(error)
        return f"{message}: {error.filename}" if error.filename else message
    if isinstance(error, MemoryError):
        return "out of memory"
    hint = "please report it with the traceback that CKPTGATE_DEBUG=1 shows"
    return f"internal error: {type(error).__name__}: {error} ({hint})"


def print_failure(message: str) -> None:
    """Print why a command, or a part of it, failed."""
    click.echo(f"ckptgate: {printable(message, 2000)}", err=True)


def _fail(message: str, code: int) -> int:
    print_failure(message)
    return code


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a command that SIGINT or SIGTERM ended."""


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _interrupted_again)
    raise KeyboardInterrupt


def _interrupted_again(_number: int, _frame: FrameType | None) -> NoReturn:
    """End at once; what is left is what a kill leaves, which every command can take up."""
    os._exit(INTERRUPTED)


class _Output(io.FileIO):
    """A standard stream that ignores a closed pipe.

    click exits with code 1 if a pipe is closed, the code of a failed check.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop the bytes if the reader is gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _unbreakable(stream: TextIO) -> TextIO:
    """Return a standard stream as `_Output`; one that is closed or not a file stays as it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
    )


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _interrupted)
    sys.stdout, sys.stderr = _unbreakable(sys.stdout), _unbreakable(sys.stderr)
    try:
        sys.exit(run(sys.argv[1:]))
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _fail(ended("terminated"), TERMINATED)
        raise
