# SPDX-License-Identifier: Apache-2.0
"""``ckptgate diff``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as, progress_bar


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--payload", is_flag=True, help="Compare the bytes of common tensors too.")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, payload: bool, format_: str) -> None:
    """Tell in what the checkpoints A and B differ: names, dtypes, shapes, configs, sizes,
    precision.

    How tensors are spread over shards, and other files, are no difference. Exit 0 equal, 1
    different.
    """
    from verifier.inspect.diff import diff as compare  # noqa: PLC0415  (numpy, see check)
    from verifier.inspect.render import diff_json, diff_text  # noqa: PLC0415

    with errors_as(format_), progress_bar("comparing", in_bytes=True) as progress:
        found = compare(a, b, payload=payload, progress=progress)
    click.echo(diff_json(found) if format_ == "json" else diff_text(found), nl=False)
    ctx.exit(0 if found.equal else 1)
