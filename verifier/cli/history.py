# SPDX-License-Identifier: Apache-2.0
"""``ckptgate history add|log|show|compare|plot|export``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from verifier.cli.groups import CommandGroup
from verifier.cli.options import FORMAT, REPLACED
from verifier.cli.recording import print_notes, print_warnings
from verifier.cli.spellings import RenamedOptions
from verifier.errors import ContentError, UsageError
from verifier.files import require_writable, write_atomic
from verifier.history import Record, append, load, read_result, recorded
from verifier.history.export import FORMATS
from verifier.history.export import export as export_records
from verifier.history.journal import dumps
from verifier.history.picture import draw
from verifier.history.render import (
    change_lines,
    compare_lines,
    log_lines,
    show_lines,
    trend_lines,
)

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = "ckptgate-history.jsonl"
_RENAMED = {"--file": ("--history",), "--to": ("--format",)}


def _file(command: Command) -> Command:
    return click.option(
        "-f",
        "--history",
        "file",
        metavar="FILE",
        default=FILE,
        envvar="CKPTGATE_HISTORY",
        show_default=True,
        help="The history.",
    )(command)


@click.group(cls=CommandGroup)
def history() -> None:
    """Record runs; show trends and change points.

    A history has one line of JSON per run: measures with intervals, keys, digests, versions. `gate
    --history FILE` and `check --history FILE` append their own runs.
    """


@history.command(cls=RenamedOptions, renamed=_RENAMED)
@click.argument("runs", metavar="RUN.json...", nargs=-1, required=True)
@click.option(
    "--name",
    default="",
    help="Name of the time series.  [default: the checkpoint's directory name]",
)
@click.option("--label", default="", help="Label recorded with the run.")
@_file
def add(runs: tuple[str, ...], name: str, label: str, file: str) -> None:
    """Append runs that `gate --format json` or `check --format json` printed."""
    records = [recorded(read_result(run), name=name, label=label) for run in runs]
    for record in records:
        append(file, record)
        click.echo(f"{file}: added {record.id}")
    print_warnings(file)


@history.command(cls=RenamedOptions, renamed=_RENAMED)
@click.option("--name", help="Only runs with this name.")
@click.option(
    "--kind",
    type=click.Choice(["gate", "check", "golden", "suite"]),
    help="Only runs of this kind.",
)
@click.option("--measure", help="Only change points of this measure.")
@click.option(
    "-n",
    "--last",
    type=click.IntRange(1, 1_000_000),
    default=30,
    show_default=True,
    help="The newest N runs.",
)
@click.option(
    "--window",
    type=click.IntRange(3, 1000),
    default=10,
    show_default=True,
    help="Passing runs in the median.",
)
@FORMAT
@_file
def log(
    name: str | None,
    kind: str | None,
    measure: str | None,
    last: int,
    window: int,
    format_: str,
    file: str,
) -> None:
    """List runs, oldest first, with trend warnings and change points."""
    records = _records(file, name, kind)
    if format_ == "json":
        click.echo(json.dumps([record.model_dump() for record in records[-last:]], indent=2))
        return
    lines = [*log_lines(records[-last:]), *change_lines(records, measure)]
    click.echo("\n".join([*lines, *trend_lines(records, window)]))


@history.command(
    cls=RenamedOptions, renamed=_RENAMED, context_settings={"ignore_unknown_options": True}
)
@click.argument("run", metavar="RUN")
@FORMAT
@_file
def show(run: str, format_: str, file: str) -> None:
    """Show the run RUN: the first characters of its id, or -1 for the newest, -2 for the one
    before.
    """
    record = _one(_records(file), run)
    click.echo(dumps(record) if format_ == "json" else "\n".join(show_lines(record)))


@history.command(
    cls=RenamedOptions, renamed=_RENAMED, context_settings={"ignore_unknown_options": True}
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_file
def compare(a: str, b: str, file: str) -> None:
    """Compare the runs A and B (ids, or -2 and -1).

    Exit 1 if their kinds or protocols differ.
    """
    records = _records(file)
    old, new = _one(records, a), _one(records, b)
    if old.kind != new.kind:
        raise ContentError(
            f"cannot compare: {old.id} is of a {old.kind} and {new.id} of a {new.kind}"
        )
    unlike = sorted(k for k in {*old.key, *new.key} if old.key.get(k) != new.key.get(k))
    if unlike:
        raise ContentError(f"cannot compare: runs used different protocols ({', '.join(unlike)})")
    click.echo("\n".join(compare_lines(old, new)))


@history.command(cls=RenamedOptions, renamed=_RENAMED)
@click.option("--measure", default="loss", show_default=True, help="Measure to plot.")
@click.option("--name", help="Only runs with this name.")
@click.option("-o", "--output", metavar="FILE.svg", required=True, help="The SVG file to write.")
@REPLACED
@_file
def plot(measure: str, name: str | None, output: str, file: str) -> None:
    """Plot a measure over the runs as SVG: lines with intervals, golden steps, change points."""
    if Path(output).suffix.lower() != ".svg":
        raise UsageError(f"-o {output}: the plot is SVG; give a name that ends in .svg")
    require_writable(output)
    write_atomic(output, draw(_records(file, name), measure, standalone=True))
    click.echo(f"wrote {output}")


@history.command(cls=RenamedOptions, renamed=_RENAMED)
@click.option(
    "--format", "to", type=click.Choice(FORMATS), help="Format of the export.  [default: by -o]"
)
@click.option("--name", help="Only runs with this name.")
@click.option("-o", "--output", metavar="FILE", help="File to write.  [default: stdout]")
@REPLACED
@_file
def export(to: str | None, name: str | None, output: str | None, file: str) -> None:
    """Export the history: bmf (Bencher, the newest run of each series), csv (one row per measure),
    json.
    """
    text = export_records(_records(file, name), to or _format_of(output))
    if output is None:
        click.echo(text, nl=False)
        return
    require_writable(output)
    write_atomic(output, text)


def _format_of(output: str | None) -> str:
    """Return the format that the ending of a file stands for.

    Raises:
        UsageError: no file, or an ending that does not name a format.
    """
    ending = Path(output or "").suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise UsageError(
            f"--format is required, or -o FILE with the ending .{' or .'.join(FORMATS)}"
        )
    return ending


def _records(file: str, name: str | None = None, kind: str | None = None) -> list[Record]:
    history = load(file)
    print_notes(history.notes)
    records = [r for r in history.records if name in (None, r.name) and kind in (None, r.kind)]
    if not records:
        filters = {"name": name, "kind": kind}
        used = " ".join(f"{k} {v!r}" for k, v in filters.items() if v is not None)
        suffix = f" with {used}" if used else ""
        raise ContentError(f"{file}: no run{suffix} among {len(history.records):,}")
    return records


def _one(records: Sequence[Record], which: str) -> Record:
    if which.startswith("-") and which[1:].isdigit() and len(which) < 9:
        back = int(which)
        if not -len(records) <= back < 0:
            raise UsageError(f"run {which}: the history has {len(records):,}")
        return records[back]
    matching = [record for record in records if record.id.startswith(which)] if which else []
    if len(matching) != 1:
        count = f"{len(matching):,} ids begin" if matching else "no id begins"
        raise UsageError(f"run {which!r}: {count} with it")
    return matching[0]
