# SPDX-License-Identifier: Apache-2.0
"""``ckptgate merge-reports``."""

from __future__ import annotations

from pathlib import Path

import click

from verifier.checkpoint import strict_json
from verifier.cli.outputs import (
    Paired,
    output_options,
    outputs,
    require,
    write_files,
    write_stdout,
)
from verifier.errors import ContentError, UsageError
from verifier.findings import Report
from verifier.run import merge_reports as merge
from verifier.run import report_of

MAX_REPORT = 1_000_000_000


@click.command("merge-reports", cls=Paired)
@click.argument("reports", metavar="REPORT…", nargs=-1, required=True)
@output_options
@click.pass_context
def merge_reports(
    ctx: click.Context, reports: tuple[str, ...], formats: tuple[str, ...], files: tuple[str, ...]
) -> None:
    """Merge the JSON reports of a check that ran in subsets.

    Each REPORT is the output of `check --subset K/N --format json`, one for each K. Result and exit
    code are those of one check of all modules.
    """
    targets = outputs(formats, files)
    require(targets)
    report = merge([_read(name) for name in reports])
    write_files(report, targets)
    write_stdout(report, targets)
    ctx.exit(report.exit_code)


def _read(name: str) -> Report:
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"{name}: no such file")
    if path.stat().st_size > MAX_REPORT:
        raise ContentError(f"{name}: larger than {MAX_REPORT:,} bytes, not a report")
    try:
        return report_of(strict_json(path.read_bytes()))
    except (ValueError, ContentError) as error:
        raise ContentError(f"{name}: {error}") from None
