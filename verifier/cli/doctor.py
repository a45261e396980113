# SPDX-License-Identifier: Apache-2.0
"""``ckptgate doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from verifier.cli.options import FORMAT
from verifier.doctor import core_broken, examine
from verifier.text import printable

MARKS = {"ok": "+", "missing": "-", "broken": "!", "info": " "}


@click.command()
@FORMAT
@click.pass_context
def doctor(ctx: click.Context, format_: str) -> None:
    """Show the environment: versions, extras, what each enables, and whether the core works.

    Exit codes: 0 whatever is missing, 4 if the core does not work.
    """
    items = examine()
    broken = core_broken(items)
    if format_ == "json":
        value = {"core": "broken" if broken else "ok", "items": [asdict(i) for i in items]}
        click.echo(json.dumps(value, indent=2))
        ctx.exit(4 if broken else 0)
    section = ""
    for item in items:
        if item.section != section:
            section = item.section
            click.echo(section)
        mark = MARKS[item.state]
        click.echo(f"  {mark} {printable(item.name, 60):16}  {printable(item.value)}")
    works = "the core does not work" if broken else "the core works"
    click.echo(f"{works}   (+ installed, - not installed, ! broken)")
    ctx.exit(4 if broken else 0)
