# SPDX-License-Identifier: Apache-2.0
"""``--format text|json`` and ``-o`` of commands with one result."""

from __future__ import annotations

import os

import click
from click.core import ParameterSource

from verifier.cli.options import together
from verifier.errors import UsageError
from verifier.files import require_writable, write_atomic

ENDINGS = {".txt": "text", ".json": "json"}
_FILE, _OVERWRITE = "ckptgate.result", "ckptgate.overwrite"


def _remember(ctx: click.Context, param: click.Parameter, value: str | bool | None) -> None:
    ctx.meta[_FILE if param.name == "output" else _OVERWRITE] = value


def _format(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return the format: the one given, else the one that the ending of the file says."""
    file = ctx.meta[_FILE]
    if file is None:
        return value
    if ctx.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT:
        ending = os.path.splitext(file)[1].lower()
        if ending not in ENDINGS:
            known = ", ".join(ENDINGS)
            raise UsageError(f"-o {file}: its ending says no format ({known}); give --format")
        value = ENDINGS[ending]
    if os.path.exists(file) and not ctx.meta[_OVERWRITE]:
        raise UsageError(f"{file} already exists; use --overwrite to replace it")
    require_writable(file)
    return value


RESULT = together(
    click.option(
        "--format",
        "format_",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        callback=_format,
        help="Output format.",
    ),
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_remember,
        help="Write the result to FILE; without --format in the format of its ending "
        f"({', '.join(ENDINGS)}).  [default: stdout]",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember,
        help="Replace an existing output.",
    ),
)
"""The command takes ``format_`` and calls `write_result`."""


def is_on_stdout() -> bool:
    """Whether the result goes to stdout."""
    ctx = click.get_current_context(silent=True)
    return ctx is None or ctx.meta.get(_FILE) is None


def write_result(text: str) -> None:
    """Write the text of a result to the file of ``-o``, else to stdout.

    Raises:
        MachineError: the file could not be written.
    """
    if is_on_stdout():
        click.echo(text, nl=False)
    else:
        write_atomic(click.get_current_context().meta[_FILE], text)
