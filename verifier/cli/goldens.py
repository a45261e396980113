# SPDX-License-Identifier: Apache-2.0
"""``ckptgate goldens list|show|test|review|accept|reject|prune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from verifier.cli.groups import CommandGroup
from verifier.cli.recording import worst_code
from verifier.errors import ContentError, UsageError
from verifier.goldens import Golden, compare, compare_with_golden, store
from verifier.history import Result, append, read_result
from verifier.history.record import build, commit_here, now
from verifier.history.render import pairs
from verifier.text import counted, printable

Command = TypeVar("Command", bound=Callable[..., Any])
VERDICT_OF_CODE = {0: "PASSED", 1: "FAILED", 3: "INCONCLUSIVE", 4: "ERROR"}


def _folder(command: Command) -> Command:
    return click.option(
        "-d",
        "--dir",
        "folder",
        metavar="DIR",
        default=_default_folder,
        envvar="CKPTGATE_GOLDENS",
        help="Directory of the records.  [default: goldens/records if it exists, else goldens]",
    )(command)


def _default_folder() -> str:
    """Return where records are by default: a project may keep data next to them in goldens/."""
    records = Path("goldens", "records")
    return str(records) if records.is_dir() else "goldens"


@click.group(cls=CommandGroup)
def goldens() -> None:
    """Review and accept golden records.

    `gate --golden DIR/NAME.golden.json` and `check --golden …` fail and write a pending record if
    they disagree with the accepted one.
    """


@goldens.command("list")
@click.argument("patterns", metavar="[NAME|GLOB]...", nargs=-1)
@_folder
def list_(patterns: tuple[str, ...], folder: str) -> None:
    """List accepted and pending records."""
    accepted, pending = store.names(folder, store.ACCEPTED), store.names(folder, store.PENDING)
    names = sorted({*accepted, *pending})
    for name in store.select(names, patterns, f"record in {folder}"):
        if name in accepted:
            golden = store.load(folder, name)
            state = "not accepted"
            if golden.accepted is not None:
                reason = printable(golden.accepted.reason, 100)
                state = f"accepted {golden.accepted.time[:10]}: {reason}"
            click.echo(f"{name:32} {golden.kind:6} {_numbers(golden):28} {state}")
        if name in pending:
            waiting = store.load_pending(folder, name)
            new, state = waiting.proposed, f"PENDING {waiting.time[:10]}"
            outcome = printable(waiting.outcome, 40)
            click.echo(f"{name:32} {new.kind:6} {_numbers(new):28} {state}: {outcome}")


@goldens.command()
@click.argument("name")
@_folder
def show(name: str, folder: str) -> None:
    """Show an accepted record: its subject, keys and numbers, and who accepted what and why."""
    _check_name(name)
    golden = store.load(folder, name)
    lines = [
        f"golden   {name}: {golden.kind} of {printable(golden.of)}, {golden.verdict}",
        f"numbers  {_numbers(golden)}",
    ]
    if golden.documents:
        tokens = sum(count for _, _, count in golden.documents)
        documents = counted(len(golden.documents), "document")
        margin = f"drift margin {golden.drift:g} nats"
        if golden.kl:
            kl = sum(golden.kl) / max(1, tokens)
            margin = f"KL {kl:.6f} nats per token, margin {golden.kl_ratio:g} times"
        lines.append(f"         {documents}, {tokens:,} tokens, {margin}")
    sections: dict[str, Mapping[str, object]] = {
        "key": golden.key,
        "env": golden.environment,
        "candid.": golden.checkpoint,
        "recipe": golden.recipe,
        "facts": golden.facts,
    }
    lines += [f"{title:8} {pairs(values)}" for title, values in sections.items() if values]
    for entry in [*golden.earlier, *([golden.accepted] if golden.accepted else [])]:
        loss = f"   loss {entry.loss:+.5f}" if entry.loss is not None else ""
        lines.append(f"accepted {entry.time[:16]}Z{loss}   {printable(entry.reason, 200)}")
    click.echo("\n".join(lines))


@goldens.command()
@click.argument("patterns", metavar="[NAME|GLOB]...", nargs=-1)
@_folder
def review(patterns: tuple[str, ...], folder: str) -> None:
    """Show what is pending: old, new, differences, outcome. Nothing is changed."""
    names = store.matching(folder, store.PENDING, patterns)
    for name in names:
        pending = store.load_pending(folder, name)
        new = pending.proposed
        accepted = store.digest_of(folder, name)
        old = store.load(folder, name) if accepted is not None else None
        comparison = compare(old, new)
        lines = [
            f"pending  {name} ({new.kind} of {printable(new.of)}, {pending.time[:16]}Z)",
            f"  old    {_numbers(old) if old else 'none'}",
            f"  new    {_numbers(new)}, {new.verdict}",
        ]
        if old is not None:
            lines += [f"         {printable(line)}" for line in _differences(old, new)]
        sentence = printable(comparison.sentence, 1000)
        lines.append(f"  result {comparison.outcome.upper()}: {sentence}")
        if pending.against != accepted:
            lines.append("  note   the accepted record has changed since; run again first")
        click.echo("\n".join(lines))
    hint = "; run `ckptgate goldens accept NAME --reason …`, or reject" if names else ""
    click.echo(f"{len(names)} pending in {folder}{hint}")


@goldens.command()
@click.argument("names", metavar="NAME|GLOB...", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why the record is accepted; kept in the record.")
@click.option(
    "--history", metavar="FILE", help="Record the acceptance in this history, as a step in plots."
)
@_folder
def accept(names: tuple[str, ...], reason: str, history: str | None, folder: str) -> None:
    """Accept pending records, with a reason. Refused where CI is set."""
    store.refuse_in_ci("accepting goldens")
    for name in store.matching(folder, store.PENDING, names):
        golden = store.accept(folder, name, reason)
        click.echo(f"accepted {name}: {_numbers(golden)}")
        if history is not None:
            _record_acceptance(history, name, golden, reason)


@goldens.command()
@click.argument("names", metavar="NAME|GLOB...", nargs=-1, required=True)
@_folder
def reject(names: tuple[str, ...], folder: str) -> None:
    """Delete pending records; accepted ones stay."""
    for name in store.matching(folder, store.PENDING, names):
        store.reject(folder, name)
        click.echo(f"rejected {name}")


@goldens.command()
@click.argument("runs", metavar="[NAME=]RUN.json...", nargs=-1, required=True)
@click.option(
    "--only",
    "patterns",
    metavar="GLOB",
    multiple=True,
    help="Compare with these goldens only.  Repeatable.",
)
@_folder
@click.pass_context
def test(ctx: click.Context, runs: tuple[str, ...], patterns: tuple[str, ...], folder: str) -> None:
    """Compare saved runs with all records; a record without a run fails too.

    A run belongs to the record of its kind and its checkpoint's directory name, or to NAME. Exit 0,
    1 if one disagrees or is unreferenced, 3 if one is inconclusive.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    selected = store.matching(folder, store.ACCEPTED, patterns)
    codes, seen = [], set()
    for name, result in _assigned(runs, folder).items():
        if patterns and name not in selected:
            continue
        comparison = compare_with_golden(result, Path(folder) / f"{name}{store.ACCEPTED}")
        codes.append(comparison.exit_code)
        seen.add(name)
        click.echo(f"{comparison.outcome:12} {name}: {printable(comparison.sentence, 1000)}")
    unreferenced = [name for name in selected if name not in seen]
    for name in unreferenced:
        click.echo(f"unreferenced {name}: no run for it; `ckptgate goldens prune` deletes it")
    if not seen:
        raise ContentError(f"no run was compared with a golden ({', '.join(patterns)})")
    code = worst_code(*codes, *([1] if unreferenced else []))
    summary = f"{len(seen)} compared, {len(unreferenced)} unreferenced"
    click.echo(f"verdict: {VERDICT_OF_CODE[code]} ({summary})")
    ctx.exit(code)


@goldens.command()
@click.argument("runs", metavar="[NAME=]RUN.json...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Only list what would be deleted.")
@_folder
def prune(runs: tuple[str, ...], dry_run: bool, folder: str) -> None:
    """Delete the accepted records that no given run belongs to. Refused where CI is set."""
    if not dry_run:
        store.refuse_in_ci("deleting goldens")
    used = set(_assigned(runs, folder))
    unused = [name for name in store.names(folder, store.ACCEPTED) if name not in used]
    for name in unused:
        if not dry_run:
            store.drop(folder, name)
        click.echo(f"{'would delete' if dry_run else 'deleted'} {name}")
    click.echo(f"{folder}: {len(unused)} {'would be ' if dry_run else ''}deleted")


def _assigned(runs: Sequence[str], folder: str) -> dict[str, Result]:
    """Return the run of each golden by its name."""
    goldens = {name: store.load(folder, name) for name in store.names(folder, store.ACCEPTED)}
    assigned: dict[str, Result] = {}
    for argument in runs:
        name, equals, file = argument.partition("=")
        result = read_result(file if equals else argument)
        if not equals:
            name = _name_of(store.golden_of(result), goldens, argument)
        _check_name(name)
        if name in assigned:
            raise UsageError(f"two runs belong to the golden {name}; use NAME=RUN.json")
        assigned[name] = result
    return assigned


def _name_of(new: Golden, goldens: Mapping[str, Golden], argument: str) -> str:
    """Return the name of the golden that a run belongs to."""
    same = [name for name, g in goldens.items() if (g.kind, g.of) == (new.kind, new.of)]
    same = [name for name in same if goldens[name].key == new.key] or same
    if len(same) > 1:
        raise UsageError(f"{argument} could belong to {' and '.join(same)}; use NAME={argument}")
    return same[0] if same else f"{new.of}.{new.kind}"


def _check_name(name: str) -> None:
    if not store.NAME.fullmatch(name):
        raise UsageError(
            f"{name[:200]!r}: a golden's name has only letters, digits, dots, dashes and "
            "underscores; use NAME=RUN.json"
        )


def _numbers(golden: Golden) -> str:
    if golden.kind == "check":
        findings = sum(
            count
            for name, count in golden.facts.items()
            if name.startswith("findings.") and isinstance(count, int)
        )
        tensors = printable(str(golden.facts.get("tensors", 0)), 20)
        return f"{tensors} tensors, {counted(findings, 'finding')}"
    if golden.loss is None:
        return "no statistics"
    if golden.low is None or golden.high is None:
        return f"loss {golden.loss:+.5f}"
    return f"loss {golden.loss:+.5f} [{golden.low:+.5f}, {golden.high:+.5f}]"


def _differences(old: Golden, new: Golden) -> list[str]:
    lines = []
    tables: dict[str, tuple[Mapping[str, object], Mapping[str, object]]] = {
        "recipe": (old.recipe, new.recipe),
        "environment": (old.environment, new.environment),
        "versions": (old.versions, new.versions),
    }
    for table, (a, b) in tables.items():
        for name in sorted({*a, *b} - {"sha256"}):
            if a.get(name) != b.get(name):
                label = name if name == table else f"{table} {name}"
                lines.append(f"{label}: {_value(a.get(name))} → {_value(b.get(name))}")
    return lines[:20]


def _value(value: object) -> str:
    return "none" if value is None else str(value)


def _record_acceptance(history: str, name: str, golden: Golden, reason: str) -> None:
    measures = {}
    if golden.loss is not None:
        measures["loss"] = {"value": golden.loss, "low": golden.low, "high": golden.high}
    fields = {
        "kind": "golden",
        "time": now(),
        "name": golden.of,
        "label": f"{name}: {reason}"[:2000],
        "verdict": "accepted",
        "measures": measures,
        "key": golden.key,
        "environment": golden.environment,
        "checkpoint": golden.checkpoint,
        "recipe": golden.recipe,
        "versions": golden.versions,
        "commit": commit_here(),
    }
    append(history, build(fields))
