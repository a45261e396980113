# SPDX-License-Identifier: Apache-2.0
"""``ckptgate baseline write`` and ``baseline prune``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.settings import judging, judging_options, settings
from verifier.errors import ContentError, UsageError

if TYPE_CHECKING:
    from verifier.findings import Report
    from verifier.run.baseline import Baseline


@click.group()
def baseline() -> None:
    """Accept today's findings, with a reason, so that a check fails on new ones."""


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.argument("uri", metavar="URI"),
            click.option(
                "--base", metavar="REF", help="The unquantized checkpoint to judge against."
            ),
            click.option(
                "--merged-from",
                metavar="VENDOR",
                help="The checkpoint whose bytes a mixed export keeps.",
            ),
            click.option(
                "--depth",
                type=click.Choice(["header", "payload", "load"]),
                default="header",
                show_default=True,
            ),
        )
    ):
        command = option(command)
    return command


@baseline.command()
@click.option(
    "--reason", required=True, help="Why the findings are accepted; stands in every new entry."
)
@_options
@judging_options
def write(
    uri: str, base: str | None, merged_from: str | None, depth: str, reason: str, **given: Any
) -> None:
    """Check URI and put what it finds into the baseline file (--baseline), with a reason.

    Entries that are there already stay; one that grew is raised to what is found now and gets the
    new reason.
    """
    from verifier.run.baseline import Baseline, accept, load, save  # noqa: PLC0415

    if not reason.strip():
        raise UsageError("--reason is empty; say why the findings are accepted")
    report, file = _judge(uri, base, merged_from, depth, given)
    old = load(file) if os.path.exists(file) else Baseline()
    found, new, raised = accept(old, report.findings, reason.strip())
    save(found, file)
    click.echo(f"{file}: {_entries(found)} ({new} new, {raised} raised)")


@baseline.command()
@_options
@judging_options
def prune(uri: str, base: str | None, merged_from: str | None, depth: str, **given: Any) -> None:
    """Check URI and drop the entries of --baseline that are no longer found; lower the counts that
    fell.
    """
    from verifier.run.baseline import load, prune, save  # noqa: PLC0415

    report, file = _judge(uri, base, merged_from, depth, given)
    found, dropped, lowered = prune(load(file), report.findings, report.coverage)
    if dropped or lowered:
        save(found, file)
    click.echo(f"{file}: {_entries(found)} ({dropped} dropped, {lowered} lowered)")


def _entries(found: Baseline) -> str:
    count = len(found.entries)
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _judge(
    uri: str, base: str | None, merged_from: str | None, depth: str, given: dict[str, Any]
) -> tuple[Report, str]:
    """Check without the baseline's entries; return the report and the baseline's path."""
    from verifier.files import require_writable  # noqa: PLC0415
    from verifier.run import check  # noqa: PLC0415  (numpy, see check)

    found, _ = settings(given)
    arguments = judging(found)
    file = arguments.pop("baseline")
    if not file:
        raise UsageError(
            "no baseline file; give --baseline FILE, or the key baseline in the configuration"
        )
    require_writable(file)
    report = check(uri, base=base, merged_from=merged_from, depth=depth, **arguments)  # type: ignore[arg-type]
    if not report.coverage:
        raise ContentError(
            f"{report.findings[0].message}; nothing was judged, and the baseline is as it was"
        )
    return report, file
