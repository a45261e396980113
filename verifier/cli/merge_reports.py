# SPDX-License-Identifier: Apache-2.0
"""``ckptgate merge-reports``."""

from __future__ import annotations

from pathlib import Path

import click

from verifier.errors import ContentError, UsageError

MAX_REPORT = 1_000_000_000


@click.command("merge-reports")
@click.argument("reports", metavar="REPORT…", nargs=-1, required=True)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.pass_context
def merge_reports(ctx: click.Context, reports: tuple[str, ...], format_: str) -> None:
    """Make one report of the JSON reports that `check --subset K/N --format json` wrote, one for
    each K.

    The result and the exit code are those of one check of all shards.
    """
    # The rules cost 150 ms, and --help does not need them.
    from verifier.checkpoint import strict_json  # noqa: PLC0415
    from verifier.report import render_json, render_text  # noqa: PLC0415
    from verifier.run import merge_reports as merge  # noqa: PLC0415
    from verifier.run import report_of  # noqa: PLC0415

    parts = []
    for name in reports:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{name}: no such file")
        if path.stat().st_size > MAX_REPORT:
            raise ContentError(f"{name}: more than {MAX_REPORT:,} bytes, which no report has")
        try:
            parts.append(report_of(strict_json(path.read_bytes())))
        except (ValueError, ContentError) as error:
            raise ContentError(f"{name}: {error}") from None
    report = merge(parts)
    click.echo(render_json(report) if format_ == "json" else render_text(report), nl=False)
    ctx.exit(report.exit_code)
