# SPDX-License-Identifier: Apache-2.0
"""``ckptgate stats``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as
from verifier.cli.options import depth
from verifier.cli.progress import progress_bar
from verifier.cli.results import RESULT, write_result
from verifier.inspect.render import stats_json, stats_text
from verifier.inspect.stats import stats as count


@click.command()
@click.argument("path")
@depth(
    "header",
    "payload",
    explanation="header: formats, sizes, bits per parameter. payload: also the values of every "
    "scale.",
)
@RESULT
@click.pass_context
def stats(ctx: click.Context, path: str, depth: str, format_: str) -> None:
    """Count formats, sizes, bits per parameter and scale values of the checkpoint at PATH.

    Exit codes: 0, or 1 if a part of the checkpoint cannot be read.
    """
    with errors_as(format_), progress_bar("reading scales", unit="byte") as progress:
        result = count(path, depth=depth, progress=progress)
    write_result(stats_json(result) if format_ == "json" else stats_text(result))
    ctx.exit(1 if result.problems else 0)
