# SPDX-License-Identifier: Apache-2.0
"""``ckptgate show``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as
from verifier.cli.results import RESULT, write_result
from verifier.errors import UsageError
from verifier.inspect.render import show_json, show_text
from verifier.inspect.show import show as inspect_block

INDEX = click.IntRange(0, 2**62)


@click.command()
@click.argument("path")
@click.argument("tensor")
@click.option("--row", type=INDEX, help="Row of the weight, or of the scale that TENSOR names.")
@click.option("--block", type=INDEX, help="Block in the row.")
@click.option("--byte", type=INDEX, help="Offset in the tensor's file, instead of row and block.")
@click.option(
    "--base", metavar="PATH", help="Also show this checkpoint's values and the nearest codes."
)
@RESULT
def show(
    path: str,
    tensor: str,
    row: int | None,
    block: int | None,
    byte: int | None,
    base: str | None,
    format_: str,
) -> None:
    """Inspect one block of TENSOR in PATH: raw bytes, scale, decoded values, expected values.

    TENSOR is a tensor, a module, or a location as a report prints it, quoted: 'NAME [row 12, block
    3]'.
    """
    if byte is not None and (row is not None or block is not None):
        raise UsageError("use --byte, or --row and --block, not both")
    with errors_as(format_):
        result = inspect_block(path, tensor, row=row, block=block, byte=byte, base=base)
    write_result(show_json(result) if format_ == "json" else show_text(result))
