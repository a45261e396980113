# SPDX-License-Identifier: Apache-2.0
"""``ckptgate show``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as
from verifier.errors import UsageError

PLACE = click.IntRange(0, 2**62)


@click.command()
@click.argument("uri", metavar="URI")
@click.argument("tensor", metavar="TENSOR")
@click.option("--row", type=PLACE, help="The row, of the weight or of the scale that TENSOR names.")
@click.option("--block", type=PLACE, help="The block in the row.")
@click.option("--byte", type=PLACE, help="The offset in the tensor's file, instead of both.")
@click.option(
    "--base", metavar="REF", help="Show what this checkpoint has there, and the nearest codes."
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def show(
    uri: str,
    tensor: str,
    row: int | None,
    block: int | None,
    byte: int | None,
    base: str | None,
    format_: str,
) -> None:
    """Show one block of TENSOR in URI: its bytes, codes, scale and values, and what belongs there.

    TENSOR is a tensor, a module, or a place as a report prints it, in quotes: 'NAME [row 12, block
    3]'.
    """
    from verifier.inspect.render import show_json, show_text  # noqa: PLC0415  (numpy, see check)
    from verifier.inspect.show import show as look  # noqa: PLC0415

    if byte is not None and (row is not None or block is not None):
        raise UsageError("--byte says where; --row and --block do not go with it")
    with errors_as(format_):
        found = look(uri, tensor, row=row, block=block, byte=byte, base=base)
    click.echo(show_json(found) if format_ == "json" else show_text(found), nl=False)
