# SPDX-License-Identifier: Apache-2.0
"""``ckptgate baseline write`` and ``baseline prune``."""

from __future__ import annotations

import os
from typing import Any

import click

from verifier.cli.groups import CommandGroup
from verifier.cli.options import BASE, MERGED_FROM, SETTINGS, depth, together
from verifier.cli.settings import check_arguments, effective_settings
from verifier.errors import ContentError, UsageError
from verifier.files import require_writable
from verifier.findings import Report
from verifier.run import baseline as baselines
from verifier.run import check
from verifier.text import counted

CHECKPOINT = together(
    click.argument("path"),
    BASE,
    MERGED_FROM,
    depth("header", "payload", "load", explanation="How deep to check, as in `ckptgate check`."),
)


@click.group(cls=CommandGroup)
def baseline() -> None:
    """Accept known findings with a reason, so that a check fails on new ones only."""


@baseline.command()
@click.option(
    "--reason", required=True, help="Why the findings are accepted; recorded in every new entry."
)
@CHECKPOINT
@SETTINGS
def write(path: str, reason: str, **options: Any) -> None:
    """Check PATH and add its findings to the baseline file (--baseline) with a reason.

    Existing entries stay. An entry whose defect got worse is raised to what was found and gets the
    new reason.
    """
    if not reason.strip():
        raise UsageError("--reason is empty; state why the findings are accepted")
    report, file = _checked(path, options)
    old = baselines.load(file) if os.path.exists(file) else baselines.Baseline()
    new, added, raised = baselines.accept(old, report.findings, reason.strip())
    baselines.save(new, file)
    click.echo(f"{file}: {counted(len(new.entries), 'entry')} ({added} new, {raised} raised)")


@baseline.command()
@CHECKPOINT
@SETTINGS
def prune(path: str, **options: Any) -> None:
    """Check PATH, remove the entries of --baseline that were not found again, and lower the counts
    that fell.
    """
    report, file = _checked(path, options)
    new, removed, lowered = baselines.prune(baselines.load(file), report.findings, report.coverage)
    if removed or lowered:
        baselines.save(new, file)
    entries = counted(len(new.entries), "entry")
    click.echo(f"{file}: {entries} ({removed} removed, {lowered} lowered)")


def _checked(path: str, options: dict[str, Any]) -> tuple[Report, str]:
    """Check without the baseline's entries; return the report and the baseline's path."""
    settings, _ = effective_settings(options)
    arguments = check_arguments(settings)
    file = arguments.pop("baseline")
    if not file:
        raise UsageError("--baseline is required, or the key baseline in the configuration file")
    require_writable(file)
    report = check(
        path,
        base=options["base"],
        merged_from=options["merged_from"],
        depth=options["depth"],
        **arguments,
    )
    if not report.coverage:
        message = report.findings[0].message
        raise ContentError(f"{message}; nothing was checked and the baseline is unchanged")
    return report, file
