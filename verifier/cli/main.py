# SPDX-License-Identifier: Apache-2.0
"""The root command: lazily imported commands, and the one place that turns errors into a message
and an exit code.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from verifier import __version__
from verifier.cli.groups import CommandGroup
from verifier.cli.terminal import (
    TERMINAL_OPTIONS,
    add_terminal_options,
    ended,
    on_interrupt,
)
from verifier.errors import CkptgateError
from verifier.text import printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from _typeshed import ReadableBuffer
    from click.shell_completion import CompletionItem

SECTIONS = {
    "Check": {
        "check": (
            "verifier.cli.check",
            "Check checkpoints: names, configs, scales, values.",
        ),
        "baseline": (
            "verifier.cli.baseline",
            "Accept known findings; only new ones fail.",
        ),
        "merge-reports": (
            "verifier.cli.merge_reports",
            "Merge the reports of a check in subsets.",
        ),
        "manifest": ("verifier.cli.manifest", "Compare published files with an export's manifest."),
        "selftest": (
            "verifier.cli.selftest",
            "Verify every rule on injected defects.",
        ),
    },
    "Export": {
        "export": ("", "Quantize a checkpoint file to file, and check the result."),
        "calibrate": ("", "Measure activation maxima of the modules that a recipe quantizes."),
        "merge": ("", "Combine quantized experts with another checkpoint as they are."),
        "repair": ("", "Fix names, expert layout and configs without re-quantizing."),
        "detect": ("", "Show fused experts and what each recipe would quantize."),
        "recipes": ("", "List recipes, show one, or explain their effect on a module."),
    },
    "Measure": {
        "gate": ("verifier.cli.gate", "Test a candidate's loss over its base against a margin."),
        "score": ("verifier.cli.gate", "Score a checkpoint once, to compare later."),
        "compare": ("verifier.cli.gate", "Compare a candidate's run with its base's run."),
        "suite": ("verifier.cli.suite", "Decide a release over several corpora and tasks."),
        "locate": ("verifier.cli.locate", "Find the layer and module that break a candidate."),
        "report": ("verifier.cli.report", "Render runs and history as one HTML page."),
    },
    "Record": {
        "history": ("verifier.cli.history", "Record runs; show trends and change points."),
        "goldens": ("verifier.cli.goldens", "Review and accept golden records."),
    },
    "Explain": {
        "explain": ("verifier.cli.rules", "Explain rules: cause, impact, fix."),
        "rules": ("verifier.cli.rules", "List the rules."),
        "show": (
            "verifier.cli.show",
            "Inspect one block: bytes, scale, values.",
        ),
        "stats": ("verifier.cli.stats", "Count formats, bits per parameter and scale values."),
        "diff": ("verifier.cli.diff", "Compare two checkpoints: names, dtypes, shapes, configs."),
        "doctor": (
            "verifier.cli.doctor",
            "Show versions, extras, and what each enables.",
        ),
        "config": ("verifier.cli.config", "Show the effective configuration."),
        "help": ("verifier.cli.help", "Show the help of a command."),
    },
}
"""Section of the help -> command -> (module, help). ``--help`` imports none of these modules; a
command without a module comes from an entry point.
"""
BUILT_IN = {
    name: entry for section in SECTIONS.values() for name, entry in section.items() if entry[0]
}
HIDDEN = {"pre-commit": "verifier.cli.pre_commit"}


def _added_commands() -> Iterable[EntryPoint]:
    """Return the commands of other packages."""
    from importlib.metadata import entry_points  # noqa: PLC0415  (15 ms, and a built-in needs none)

    return entry_points(group="ckptgate.commands")


class LazyGroup(CommandGroup):
    """A group that imports a command when it runs; the help of built-in commands is in the
    table.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all command names, sorted."""
        return sorted({*BUILT_IN, *(e.name for e in _added_commands())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        module = HIDDEN.get(cmd_name) or BUILT_IN.get(cmd_name, ("", ""))[0]
        if module:
            command: click.Command = getattr(
                importlib.import_module(module), cmd_name.replace("-", "_")
            )
            add_terminal_options(command)
            return command
        for entry in _added_commands():
            if entry.name != cmd_name:
                continue
            loaded: click.Command = entry.load()
            add_terminal_options(loaded)
            return loaded
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, without importing the built-in ones."""
        others = [n for n in self.list_commands(ctx) if n not in BUILT_IN]
        for title, commands in SECTIONS.items():
            rows = [(n, self._help(ctx, n)) for n in commands if n in BUILT_IN or n in others]
            others = [n for n in others if n not in commands]
            with formatter.section(title):
                formatter.write_dl(rows)
        if others:
            with formatter.section("More"):
                formatter.write_dl([(n, self._help(ctx, n)) for n in others])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands and options that complete a word, without importing the commands."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415  (for a shell only)

        names = [n for n in self.list_commands(ctx) if n.startswith(incomplete)]
        items = [CompletionItem(n, help=BUILT_IN.get(n, ("", ""))[1]) for n in names]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def _help(self, ctx: click.Context, name: str) -> str:
        texts = {n: text for section in SECTIONS.values() for n, (_, text) in section.items()}
        if name in texts:
            return texts[name]
        command = self.get_command(ctx, name)
        return command.get_short_help_str(80) if command else ""


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="ckptgate")
def cli() -> None:
    """Validate quantized LLM checkpoints before you ship them.

    `ckptgate check PATH` checks a checkpoint; `ckptgate help COMMAND` describes a command.

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
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return f"out of memory: {error}"
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


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, _again)
    raise SystemExit(TERMINATED)


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, _again)
    raise KeyboardInterrupt


def _again(number: int, _frame: FrameType | None) -> NoReturn:
    """End at once; what is left is what a kill leaves, which every command can take up."""
    os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)


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
    # OpenMP reads it when torch is loaded. Threads that spin for one another lose a third of a
    # command's time where another process holds a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imports make objects and no cycles: with the default of 700, looking for cycles takes a tenth
    # of the time in which torch and numba are imported.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # shells have it ignored in "… &"
        signal.signal(signal.SIGINT, _interrupted)
    sys.stdout, sys.stderr = _unbreakable(sys.stdout), _unbreakable(sys.stderr)
    try:
        code = run(sys.argv[1:])
        gc.freeze()  # the interpreter looks for cycles among all that is alive before it ends
        sys.exit(code)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _fail(ended("terminated"), TERMINATED)
        if stop.code in (INTERRUPTED, TERMINATED):
            # The interpreter restores the default on its way out: one more would change the code.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
