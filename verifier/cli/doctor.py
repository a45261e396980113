# SPDX-License-Identifier: Apache-2.0
"""``ckptgate doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

MARKS = {"ok": "+", "missing": "-", "broken": "!", "info": " "}


@click.command()
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.pass_context
def doctor(ctx: click.Context, format_: str) -> None:
    """Tell what is installed here, what it enables, and whether the core works.

    Exit 0 whatever is missing, 4 where the core itself is broken.
    """
    # The part that must run where numpy does not.
    from verifier.doctor import core_broken, examine  # noqa: PLC0415
    from verifier.text import printable  # noqa: PLC0415

    items = examine()
    broken = core_broken(items)
    if format_ == "json":
        click.echo(
            json.dumps(
                {"core": "broken" if broken else "ok", "items": [asdict(i) for i in items]},
                indent=2,
            )
        )
    else:
        section = ""
        for i in items:
            if i.section != section:
                section = i.section
                click.echo(section)
            click.echo(f"  {MARKS[i.state]} {printable(i.name, 60):16}  {printable(i.value)}")
        click.echo(
            "the core is broken"
            if broken
            else "the core works   (+ there, - not installed, ! broken)"
        )
    ctx.exit(4 if broken else 0)
