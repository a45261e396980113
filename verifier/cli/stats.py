# SPDX-License-Identifier: Apache-2.0
"""``ckptgate stats``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as, progress_bar


@click.command()
@click.argument("uri", metavar="URI")
@click.option(
    "--depth",
    type=click.Choice(["header", "payload"]),
    default="header",
    show_default=True,
    help="header: formats, sizes, bits per parameter. payload: the values of every scale too.",
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.pass_context
def stats(ctx: click.Context, uri: str, depth: str, format_: str) -> None:
    """Count the checkpoint URI: formats by role, real bits per parameter, sizes, and scale values.

    It judges nothing. Exit 0, or 1 where the checkpoint cannot be read whole.
    """
    from verifier.inspect.render import stats_json, stats_text  # noqa: PLC0415  (numpy, see check)
    from verifier.inspect.stats import stats as count  # noqa: PLC0415

    with errors_as(format_), progress_bar("reading scales", in_bytes=True) as progress:
        found = count(uri, depth=depth, progress=progress)
    click.echo(stats_json(found) if format_ == "json" else stats_text(found), nl=False)
    ctx.exit(1 if found.problems else 0)
