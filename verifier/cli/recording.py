# SPDX-License-Identifier: Apache-2.0
"""``--history`` and ``--golden`` of commands that make a result, which is put on record.

A command adds the options with `recording_options`, calls `require_recordable` before its work, and
`record` after it; `record` returns the exit code that the command ends with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from verifier.errors import UsageError
from verifier.files import require_writable
from verifier.text import printable

if TYPE_CHECKING:
    from verifier.history import Result


@dataclass(frozen=True)
class Recording:
    """Where a result is put on record: a history with a label, and a golden to compare with."""

    history: str | None = None
    label: str = ""
    golden: str | None = None


def recording_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--history``, ``--label`` and ``--golden``; they arrive as a `Recording` named
    ``recording``.
    """

    @wraps(command)
    def with_recording(
        *args: Any, history: str | None, label: str, golden: str | None, **options: Any
    ) -> Any:
        return command(*args, recording=Recording(history, label, golden), **options)

    for option in reversed(_OPTIONS):
        with_recording = option(with_recording)
    return with_recording


HISTORY = click.option(
    "--history", metavar="FILE", help="Append the run to this history; see `ckptgate history`."
)
LABEL = click.option("--label", default="", metavar="TEXT", help="Label recorded with this run.")
_OPTIONS = (
    HISTORY,
    LABEL,
    click.option(
        "--golden", metavar="FILE", help="Accepted record to agree with; see `ckptgate goldens`."
    ),
)


def require_recordable(recording: Recording) -> None:
    """Refuse, before the work is done, a history or a golden that cannot be written.

    Raises:
        UsageError: naming the option or the file.
    """
    if recording.label and recording.history is None:
        raise UsageError("--label needs --history FILE")
    for file in (recording.history, recording.golden):
        if file is not None:
            require_writable(file)
    if recording.golden is not None:
        from verifier.goldens.store import split_path  # noqa: PLC0415  (pydantic, for few runs)

        split_path(recording.golden)


def record(result: Result, code: int, recording: Recording, seconds: float | None = None) -> int:
    """Append a result to a history, compare it with a golden, and return the exit code.

    Args:
        result: of the command.
        code: its exit code. A golden can make it worse, never better.
        recording: where to.
        seconds: wall time.
    """
    if recording.history is not None:
        from verifier.history import append, recorded  # noqa: PLC0415  (pydantic, for few runs)

        append(recording.history, recorded(result, label=recording.label, seconds=seconds))
        print_warnings(recording.history)
    if recording.golden is None:
        return code
    from verifier.goldens import compare_with_golden  # noqa: PLC0415  (pydantic, for few runs)

    comparison = compare_with_golden(result, recording.golden)
    name = os.path.basename(recording.golden)
    click.echo(f"golden   {name}: {printable(comparison.sentence, 1000)}", err=True)
    return worst_code(code, comparison.exit_code)


def worst_code(*codes: int) -> int:
    """Return the most severe code: error, usage, failed, inconclusive, passed."""
    return next((code for code in (4, 2, 1, 3) if code in codes), 0)


def print_warnings(file: str) -> None:
    """Print on stderr what was repaired, and where the newest run deviates from the passing runs
    before it.
    """
    from verifier.history import load  # noqa: PLC0415  (pydantic, for few runs)
    from verifier.history.render import trend_lines  # noqa: PLC0415

    history = load(file)
    newest = history.records[-1:]
    series = [r for r in history.records if newest and r.series == newest[0].series]
    for line in trend_lines(series):
        click.echo(line, err=True)
    print_notes(history.notes)


def print_notes(notes: list[str]) -> None:
    """Print on stderr what is wrong with a history file."""
    for note in notes:
        click.echo(f"note     {printable(note)}", err=True)
