# SPDX-License-Identifier: Apache-2.0
"""``ckptgate diff``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as
from verifier.cli.options import depth
from verifier.cli.progress import progress_bar
from verifier.cli.results import RESULT, write_result
from verifier.cli.spellings import RenamedOptions
from verifier.inspect.diff import diff as compare
from verifier.inspect.render import diff_json, diff_text


@click.command(cls=RenamedOptions, renamed={"--payload": ("--depth", "payload")})
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@depth(
    "header",
    "payload",
    explanation="header: names, shapes, dtypes, configs. payload: also bytes of common tensors.",
)
@RESULT
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, depth: str, format_: str) -> None:
    """Compare the checkpoints A and B: names, dtypes, shapes, configs, sizes, precision.

    The distribution over shards and the auxiliary files are shown, and do not count as differences.
    Exit codes: 0 equal, 1 different.
    """
    with errors_as(format_), progress_bar("comparing", unit="byte") as progress:
        result = compare(a, b, payload=depth == "payload", progress=progress)
    write_result(diff_json(result) if format_ == "json" else diff_text(result))
    ctx.exit(0 if result.equal else 1)
