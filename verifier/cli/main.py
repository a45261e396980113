# SPDX-License-Identifier: Apache-2.0
"""The click root: lazy commands, and the one place where errors become a message and an exit
code.
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
from verifier.errors import CkptgateError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUILT_IN = {
    "baseline": (
        "verifier.cli.baseline",
        "Accept findings with a reason; a check then fails on new ones.",
    ),
    "check": ("verifier.cli.check", "Judge a checkpoint."),
    "compare": ("verifier.cli.gate", "Judge a candidate's run against its base's."),
    "config": ("verifier.cli.config", "Show how checks are configured here."),
    "diff": ("verifier.cli.diff", "Tell in what two checkpoints differ."),
    "doctor": ("verifier.cli.doctor", "Tell what is installed here and what it enables."),
    "explain": ("verifier.cli.rules", "Print what a rule means, whom it hurts and how to mend it."),
    "gate": ("verifier.cli.gate", "Measure a candidate's loss against its base."),
    "goldens": (
        "verifier.cli.goldens",
        "Review what runs are held against, and accept it with a reason.",
    ),
    "history": ("verifier.cli.history", "Remember runs; trends, change points, exports."),
    "merge-reports": (
        "verifier.cli.merge_reports",
        "Make one report of the reports on all subsets of a checkpoint.",
    ),
    "report": ("verifier.cli.report", "Draw runs and their history as one HTML page."),
    "rules": ("verifier.cli.rules", "List the rules."),
    "score": ("verifier.cli.gate", "Score a checkpoint once, to compare later."),
    "selftest": ("verifier.cli.selftest", "Prove the rules where they are installed."),
    "show": (
        "verifier.cli.show",
        "Show one block of a tensor: bytes, scale, values, what belongs there.",
    ),
    "stats": ("verifier.cli.stats", "Count formats, bits per parameter and scales."),
}


class LazyGroup(click.Group):
    """A group that imports a command only when it runs; the help texts of the built-in ones stand
    in the table.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all command names, sorted."""
        return sorted({*BUILT_IN, *(e.name for e in entry_points(group="ckptgate.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name in BUILT_IN:
            command: click.Command = getattr(
                importlib.import_module(BUILT_IN[cmd_name][0]), cmd_name.replace("-", "_")
            )
            return command
        for entry in entry_points(group="ckptgate.commands", name=cmd_name):
            loaded: click.Command = entry.load()
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
@click.version_option(__version__, prog_name="ckptgate")
def cli() -> None:
    """Judge quantized LLM checkpoints before they ship: the gate between an exporter and a serving
    engine.

    Exit codes: 0 passed, 1 failed, 2 usage, 3 inconclusive, 4 error; docs/exit-codes.md.
    """


def run(argv: Sequence[str]) -> int:
    """Run a command line in this process and return its exit code; messages go to stderr."""
    try:
        result = cli.main(args=list(argv), prog_name="ckptgate", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted; nothing was left under a final name", 130)
    except CkptgateError as error:
        return _say(str(error), error.exit_code)
    except Exception as error:
        if shows_defects(error):
            raise
        return _say(explain_failure(error), 4)


def shows_defects(error: Exception) -> bool:
    """Whether an error is a defect of ckptgate and $CKPTGATE_DEBUG asks to see where it is."""
    return not isinstance(error, CkptgateError | OSError | MemoryError) and bool(
        os.environ.get("CKPTGATE_DEBUG")
    )


def explain_failure(error: Exception) -> str:
    """Return what the machine or the tool is at fault with, in one line."""
    if isinstance(error, CkptgateError):
        return str(error)
    if isinstance(error, OSError):
        what = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        return f"{what}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"a defect of ckptgate: {type(error).__name__}: {error} (CKPTGATE_DEBUG=1 shows where; please report it)"


def _say(message: str, code: int) -> int:
    from verifier.text import printable  # noqa: PLC0415  (only where there is something to say)

    click.echo(f"ckptgate: {printable(message, 2000)}", err=True)
    return code


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


class _Output(io.FileIO):
    """A standard stream that swallows what is written after its reader went away.

    click ends a command with 1 where a pipe is closed, which is the code of a failed check.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop what nobody reads."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _unbreakable(stream: TextIO) -> TextIO:
    """Return a standard stream as `_Output`; one that is closed, or no file, stays as it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
    )


def main() -> NoReturn:
    """Run the process's own command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.stdout, sys.stderr = _unbreakable(sys.stdout), _unbreakable(sys.stderr)
    sys.exit(run(sys.argv[1:]))
