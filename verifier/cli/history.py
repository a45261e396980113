# SPDX-License-Identifier: Apache-2.0
"""``ckptgate history add|log|show|compare|plot|export|reindex``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from verifier.errors import ContentError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from verifier.history import Record

FILE = "ckptgate-history.jsonl"


def _file(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "-f",
        "--file",
        metavar="FILE",
        default=FILE,
        envvar="CKPTGATE_HISTORY",
        show_default=True,
        help="The history.",
    )(command)


@click.group()
def history() -> None:
    """Remember runs: measures with intervals, keys, digests, versions; one line of JSON each.

    `gate --history FILE` and `check --history FILE` add their runs by themselves.
    """


@history.command()
@click.argument("runs", metavar="RUN.json...", nargs=-1, required=True)
@click.option(
    "--name", default="", help="What the time series is called; by default the checkpoint's folder."
)
@click.option("--label", default="", help="A note that stays with the run.")
@_file
def add(runs: tuple[str, ...], name: str, label: str, file: str) -> None:
    """Append runs that `gate --format json` or `check --format json` printed."""
    from verifier.cli.recording import warn  # noqa: PLC0415
    from verifier.history.journal import append  # noqa: PLC0415
    from verifier.history.record import read_run, recorded  # noqa: PLC0415

    found = [recorded(read_run(run), name=name, label=label) for run in runs]
    for r in found:
        append(file, r)
        click.echo(f"{file}: added {r.id}")
    warn(file)


@history.command()
@click.option("--name", help="Runs of this name only.")
@click.option("--kind", type=click.Choice(["gate", "check", "golden"]))
@click.option("--measure", help="Change points of this measure only.")
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
    help="Accepted runs in the median.",
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
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
    from verifier.history.render import change_lines, log_lines, trend_lines  # noqa: PLC0415

    found = _records(file, name, kind)
    if format_ == "json":
        click.echo(json.dumps([r.model_dump() for r in found[-last:]], indent=2))
        return
    lines = [*log_lines(found[-last:]), *change_lines(found, measure), *trend_lines(found, window)]
    click.echo("\n".join(lines))


@history.command(context_settings={"ignore_unknown_options": True})
@click.argument("run", metavar="RUN")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@_file
def show(run: str, format_: str, file: str) -> None:
    """Show the run RUN: the first characters of its id, or -1 for the newest, -2 for the one
    before.
    """
    from verifier.history.journal import dumps  # noqa: PLC0415
    from verifier.history.render import show_lines  # noqa: PLC0415

    found = _one(_records(file), run)
    click.echo(dumps(found) if format_ == "json" else "\n".join(show_lines(found)))


@history.command(context_settings={"ignore_unknown_options": True})
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_file
def compare(a: str, b: str, file: str) -> None:
    """Compare the runs A and B (ids, or -2 and -1); exit 1 where they are of unlike kinds or
    protocols.
    """
    from verifier.history.render import compare_lines  # noqa: PLC0415

    found = _records(file)
    old, new = _one(found, a), _one(found, b)
    if old.kind != new.kind:
        raise ContentError(
            f"{old.id} is of a {old.kind} and {new.id} of a {new.kind}; they have no measure in common"
        )
    unlike = sorted(k for k in {*old.key, *new.key} if old.key.get(k) != new.key.get(k))
    if unlike:
        raise ContentError(
            f"{old.id} and {new.id} are of unlike protocols ({', '.join(unlike)}); they cannot be compared"
        )
    click.echo("\n".join(compare_lines(old, new)))


@history.command()
@click.option("--measure", default="loss", show_default=True)
@click.option("--name", help="Runs of this name only.")
@click.option("-o", "--output", metavar="FILE.svg", required=True)
@_file
def plot(measure: str, name: str | None, output: str, file: str) -> None:
    """Draw a measure over the runs as SVG: a line for each series, its interval, golden steps,
    change points.
    """
    from verifier.files import require_writable, write_atomic  # noqa: PLC0415
    from verifier.history.picture import draw  # noqa: PLC0415

    require_writable(output)
    write_atomic(output, draw(_records(file, name), measure, standalone=True))
    click.echo(f"wrote {output}")


@history.command()
@click.option("--to", type=click.Choice(["bmf", "csv", "json"]), required=True)
@click.option("--name", help="Runs of this name only.")
@click.option("-o", "--output", metavar="FILE", help="Where it goes; stdout without.")
@_file
def export(to: str, name: str | None, output: str | None, file: str) -> None:
    """Export the history: bmf (Bencher, the newest run of each series), csv (a row a measure),
    json.
    """
    from verifier.files import require_writable, write_atomic  # noqa: PLC0415
    from verifier.history.export import export as convert  # noqa: PLC0415

    text = convert(_records(file, name), to)
    if output is None:
        click.echo(text, nl=False)
        return
    require_writable(output)
    write_atomic(output, text)


@history.command()
@_file
def reindex(file: str) -> None:
    """Write the SQLite index FILE.sqlite anew from the history; the history itself is never made
    from it.
    """
    from verifier.history.index import index_of  # noqa: PLC0415
    from verifier.history.index import reindex as write  # noqa: PLC0415

    found = write(file)
    _say_notes(found.notes)
    click.echo(f"{index_of(file)}: {len(found.records):,} runs")


def _records(file: str, name: str | None = None, kind: str | None = None) -> list[Record]:
    from verifier.history.journal import load  # noqa: PLC0415  (pydantic, which --help does not need)

    found = load(file)
    _say_notes(found.notes)
    records = [r for r in found.records if name in (None, r.name) and kind in (None, r.kind)]
    if not records:
        what = " ".join(f"{k} {v!r}" for k, v in (("name", name), ("kind", kind)) if v is not None)
        raise ContentError(
            f"{file}: no run{f' of {what}' if what else ''} among {len(found.records):,}"
        )
    return records


def _say_notes(notes: Sequence[str]) -> None:
    from verifier.text import printable  # noqa: PLC0415

    for note in notes:
        click.echo(f"note     {printable(note)}", err=True)


def _one(records: Sequence[Record], which: str) -> Record:
    if which.startswith("-") and which[1:].isdigit() and len(which) < 9:
        back = int(which)
        if not -len(records) <= back < 0:
            raise UsageError(f"run {which}: the history has {len(records):,}")
        return records[back]
    found = [r for r in records if r.id.startswith(which)] if which else []
    if len(found) != 1:
        raise UsageError(f"run {which!r}: {'no' if not found else f'{len(found):,}'} ids begin so")
    return found[0]
