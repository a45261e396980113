# SPDX-License-Identifier: Apache-2.0
"""``ckptgate goldens list|show|test|review|accept|reject|prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.errors import ContentError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from verifier.goldens import Golden


def _folder(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "-d",
        "--dir",
        "folder",
        metavar="DIR",
        default="goldens",
        envvar="CKPTGATE_GOLDENS",
        show_default=True,
        help="Where the records lie.",
    )(command)


@click.group()
def goldens() -> None:
    """Review what runs are held against, and accept it with a reason.

    `gate --golden DIR/NAME.golden.json` and `check --golden …` write a pending record where they
    disagree, and fail.
    """


@goldens.command("list")
@click.argument("patterns", metavar="[NAME|GLOB]...", nargs=-1)
@_folder
def list_(patterns: tuple[str, ...], folder: str) -> None:
    """List accepted and pending records."""
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.text import printable  # noqa: PLC0415

    accepted, pending = store.names(folder, store.ACCEPTED), store.names(folder, store.PENDING)
    for name in _any_of(sorted({*accepted, *pending}), patterns, folder):
        if name in accepted:
            g = store.load(folder, name)
            when = (
                f"accepted {g.accepted.time[:10]}: {printable(g.accepted.reason, 100)}"
                if g.accepted
                else "not accepted"
            )
            click.echo(f"{name:32} {g.kind:6} {_what(g):28} {when}")
        if name in pending:
            p = store.load_pending(folder, name)
            click.echo(
                f"{name:32} {p.proposed.kind:6} {_what(p.proposed):28} PENDING {p.time[:10]}: {printable(p.outcome, 40)}"
            )


@goldens.command()
@click.argument("name")
@_folder
def show(name: str, folder: str) -> None:
    """Show an accepted record: what it is of, its keys, its numbers, who accepted what before and
    why.
    """
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.text import printable  # noqa: PLC0415

    _known_name(name)
    g = store.load(folder, name)
    lines = [f"golden   {name}: {g.kind} of {printable(g.of)}, {g.verdict}", f"numbers  {_what(g)}"]
    if g.documents:
        lines.append(
            f"         {len(g.documents):,} documents, {sum(t for _, _, t in g.documents):,} tokens, drift {g.drift:g} nats"
        )
    for what, values in (
        ("key", g.key),
        ("env", g.environment),
        ("candid.", g.checkpoint),
        ("recipe", g.recipe),
        ("facts", g.facts),
    ):
        if values:
            lines.append(
                f"{what:8} "
                + ", ".join(
                    f"{printable(k, 60)} {printable(str(v), 80)}" for k, v in values.items()
                )
            )
    for a in [*g.earlier, *([g.accepted] if g.accepted else [])]:
        loss = f"   loss {a.loss:+.5f}" if a.loss is not None else ""
        lines.append(f"accepted {a.time[:16]}Z{loss}   {printable(a.reason, 200)}")
    click.echo("\n".join(lines))


@goldens.command()
@click.argument("patterns", metavar="[NAME|GLOB]...", nargs=-1)
@_folder
def review(patterns: tuple[str, ...], folder: str) -> None:
    """Show what is pending: old, new, interval, verdict. It changes nothing."""
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.goldens.judge import judge  # noqa: PLC0415
    from verifier.text import printable  # noqa: PLC0415

    found = store.matching(folder, store.PENDING, patterns)
    for name in found:
        p = store.load_pending(folder, name)
        accepted = store.digest_of(folder, name)
        old = store.load(folder, name) if accepted is not None else None
        judged = judge(old, p.proposed)
        click.echo(
            f"pending  {name} ({p.proposed.kind} of {printable(p.proposed.of)}, {p.time[:16]}Z)"
        )
        click.echo(f"  old    {_what(old) if old else 'none'}")
        click.echo(f"  new    {_what(p.proposed)}, {p.proposed.verdict}")
        for line in _differences(old, p.proposed):
            click.echo(f"         {printable(line)}")
        click.echo(f"  found  {judged.outcome.upper()}: {printable(judged.sentence, 1000)}")
        if p.against != accepted:
            click.echo("  note   the accepted record changed since; run again before you accept")
    click.echo(
        f"{len(found)} pending in {folder}"
        + ("; `ckptgate goldens accept NAME --reason …`, or reject" if found else "")
    )


@goldens.command()
@click.argument("names", metavar="NAME|GLOB...", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why the record is accepted; it stays in the record.")
@click.option(
    "--history", metavar="FILE", help="Note the acceptance in this history, as a step of its plot."
)
@_folder
def accept(names: tuple[str, ...], reason: str, history: str | None, folder: str) -> None:
    """Make pending records the accepted ones, with a reason. Refused where CI is set."""
    from verifier.goldens import store  # noqa: PLC0415

    store.refuse_in_ci("accepts goldens")
    for name in store.matching(folder, store.PENDING, names):
        g = store.accept(folder, name, reason)
        click.echo(f"accepted {name}: {_what(g)}")
        if history is not None:
            _note(history, name, g, reason)


@goldens.command()
@click.argument("names", metavar="NAME|GLOB...", nargs=-1, required=True)
@_folder
def reject(names: tuple[str, ...], folder: str) -> None:
    """Drop pending records; what is accepted stays."""
    from verifier.goldens import store  # noqa: PLC0415

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
    help="Hold against these goldens alone; repeatable.",
)
@_folder
@click.pass_context
def test(ctx: click.Context, runs: tuple[str, ...], patterns: tuple[str, ...], folder: str) -> None:
    """Hold saved runs against all records; a record that no run is of fails too.

    A run belongs to the record of its kind and its checkpoint's folder name, or to NAME. Exit 0, 1
    where one disagrees or is unreferenced, 3 where neither is shown.
    """
    from verifier.cli.recording import worst_code  # noqa: PLC0415
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.goldens.judge import hold  # noqa: PLC0415
    from verifier.text import printable  # noqa: PLC0415

    Path(folder).mkdir(parents=True, exist_ok=True)
    wanted = store.matching(folder, store.ACCEPTED, patterns)
    codes, seen = [], set()
    for name, run in _assigned(runs, folder).items():
        if patterns and name not in wanted:
            continue
        judged = hold(run, Path(folder) / f"{name}{store.ACCEPTED}")
        codes.append(judged.exit_code)
        seen.add(name)
        click.echo(f"{judged.outcome:9} {name}: {printable(judged.sentence, 1000)}")
    unreferenced = [n for n in wanted if n not in seen]
    for name in unreferenced:
        click.echo(f"unreferenced {name}: no run is of it; `ckptgate goldens prune` drops it")
    if not seen:
        raise ContentError(f"no run was held against a golden ({', '.join(patterns)})")
    code = worst_code(*codes, *([1] if unreferenced else []))
    verdict = {0: "PASSED", 1: "FAILED", 3: "INCONCLUSIVE", 4: "ERROR"}[code]
    click.echo(f"verdict: {verdict} ({len(seen)} held, {len(unreferenced)} unreferenced)")
    ctx.exit(code)


@goldens.command()
@click.argument("runs", metavar="[NAME=]RUN.json...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Name what would be dropped.")
@_folder
def prune(runs: tuple[str, ...], dry_run: bool, folder: str) -> None:
    """Drop the accepted records that none of the given runs is of. Refused where CI is set."""
    from verifier.goldens import store  # noqa: PLC0415

    if not dry_run:
        store.refuse_in_ci("drops goldens")
    keep = set(_assigned(runs, folder))
    old = [n for n in store.names(folder, store.ACCEPTED) if n not in keep]
    for name in old:
        if not dry_run:
            store.drop(folder, name)
        click.echo(f"{'would drop' if dry_run else 'dropped'} {name}")
    click.echo(f"{folder}: {len(old)} {'would be ' if dry_run else ''}dropped")


def _assigned(runs: Sequence[str], folder: str) -> dict[str, dict[str, Any]]:
    """Return the run of each golden by its name."""
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.history.record import read_run  # noqa: PLC0415

    have = {n: store.load(folder, n) for n in store.names(folder, store.ACCEPTED)}
    found: dict[str, dict[str, Any]] = {}
    for given in runs:
        name, equals, file = given.partition("=")
        run = read_run(file if equals else given)
        if not equals:
            new = store.proposed(run)
            of = [n for n, g in have.items() if (g.kind, g.of) == (new.kind, new.of)]
            of = [n for n in of if have[n].key == new.key] or of
            if len(of) > 1:
                raise UsageError(f"{given}: of {' and '.join(of)}; say which, NAME={given}")
            name = of[0] if of else f"{new.of}.{new.kind}"
        _known_name(name)
        if name in found:
            raise UsageError(f"two runs are of the golden {name}; give each its own, NAME=RUN.json")
        found[name] = run
    return found


def _any_of(have: list[str], patterns: Sequence[str], folder: str) -> list[str]:
    from fnmatch import fnmatchcase  # noqa: PLC0415

    for p in patterns:
        if not any(fnmatchcase(n, p) for n in have):
            raise ContentError(f"{p!r} matches no record in {folder} ({len(have)} are there)")
    return [n for n in have if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def _known_name(name: str) -> None:
    from verifier.goldens.store import NAME  # noqa: PLC0415

    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:200]!r}: a golden's name is of letters, digits, dots, dashes and underscores; give NAME=RUN.json"
        )


def _what(g: Golden) -> str:
    from verifier.text import printable  # noqa: PLC0415

    if g.kind == "check":
        errors = sum(
            v for k, v in g.facts.items() if k.startswith("findings.") and isinstance(v, int)
        )
        return f"{printable(str(g.facts.get('tensors', 0)), 20)} tensors, {errors:,} findings"
    if g.loss is None or g.low is None or g.high is None:
        return "no statistics" if g.loss is None else f"loss {g.loss:+.5f}"
    return f"loss {g.loss:+.5f} [{g.low:+.5f}, {g.high:+.5f}]"


def _differences(old: Golden | None, new: Golden) -> list[str]:
    if old is None:
        return []
    found = []
    for what in ("recipe", "environment", "versions"):
        a, b = getattr(old, what), getattr(new, what)
        for k in sorted({*a, *b} - {"sha256"}):
            if a.get(k) != b.get(k):
                found.append(f"{k if k == what else f'{what} {k}'}: {a.get(k)} -> {b.get(k)}")
    return found[:20]


def _note(history: str, name: str, g: Golden, reason: str) -> None:
    from verifier.history.journal import append  # noqa: PLC0415
    from verifier.history.record import build, commit_here, now  # noqa: PLC0415

    measures = (
        {"loss": {"value": g.loss, "low": g.low, "high": g.high}} if g.loss is not None else {}
    )
    append(
        history,
        build(
            {
                "kind": "golden",
                "time": now(),
                "name": g.of,
                "label": f"{name}: {reason}"[:2000],
                "verdict": "accepted",
                "measures": measures,
                "key": g.key,
                "environment": g.environment,
                "checkpoint": g.checkpoint,
                "recipe": g.recipe,
                "versions": g.versions,
                "commit": commit_here(),
            }
        ),
    )
