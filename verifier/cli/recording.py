# SPDX-License-Identifier: Apache-2.0
"""``--history`` and ``--golden`` of commands that make a run: the run is put on record after it was
made.

A command adds the options with `recording_options`, calls `recordable` before its work, and
`record` with what it prints as JSON after it; `record` returns the exit code that the command ends
with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from verifier.errors import UsageError


def recording_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--history``, ``--label`` and ``--golden``; they arrive as ``history``, ``label`` and
    ``golden``.
    """
    command = click.option(
        "--golden", metavar="FILE", help="An accepted record to agree with; see `ckptgate goldens`."
    )(command)
    command = click.option(
        "--label", default="", metavar="TEXT", help="A note that stands in the history."
    )(command)
    return click.option(
        "--history", metavar="FILE", help="Append the run to this history; see `ckptgate history`."
    )(command)


def recordable(history: str | None, golden: str | None = None, label: str = "") -> None:
    """Refuse, before the work is done, a history or a golden that cannot be written."""
    from verifier.files import require_writable  # noqa: PLC0415  (only where a command runs)

    if label and history is None:
        raise UsageError("--label is a note in a history; give --history FILE too")
    for file in (history, golden):
        if file is not None:
            require_writable(file)
    if golden is not None:
        from verifier.goldens.store import split_path  # noqa: PLC0415

        split_path(golden)


def record(
    text: str,
    code: int,
    *,
    history: str | None,
    label: str = "",
    golden: str | None = None,
    seconds: float | None = None,
) -> int:
    """Append a run to a history, hold it against a golden, and return the exit code.

    Args:
        text: what the command prints as JSON.
        code: its own exit code. A golden can make a pass less than that, never more.
        history: the history file, or None.
        label: a note.
        golden: the file of the accepted record, or None.
        seconds: wall time.
    """
    if history is None and golden is None:
        return code
    from verifier.history.record import parse_run, recorded  # noqa: PLC0415

    run = parse_run(text, "the run")
    if history is not None:
        from verifier.history import append  # noqa: PLC0415

        append(history, recorded(run, label=label, seconds=seconds))
        warn(history)
    if golden is not None:
        from verifier.goldens.judge import hold  # noqa: PLC0415
        from verifier.text import printable  # noqa: PLC0415

        judged = hold(run, golden)
        click.echo(
            f"golden   {os.path.basename(golden)}: {printable(judged.sentence, 1000)}", err=True
        )
        return worst_code(code, judged.exit_code)
    return code


def worst_code(*codes: int) -> int:
    """Return the code that says most: error, failed, inconclusive, passed."""
    return next((c for c in (4, 2, 1, 3) if c in codes), 0)


def warn(file: str) -> None:
    """Say on stderr what was mended, and where the newest run is off the accepted runs before
    it.
    """
    from verifier.history.journal import load  # noqa: PLC0415
    from verifier.history.render import trend_lines  # noqa: PLC0415

    found = load(file)
    for line in trend_lines(
        found.records[-1:] and [r for r in found.records if r.series == found.records[-1].series]
    ):
        click.echo(line, err=True)
    for note in found.notes:
        click.echo(f"note     {note}", err=True)
