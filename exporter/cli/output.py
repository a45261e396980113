# SPDX-License-Identifier: Apache-2.0
"""What `export`, `merge` and `repair` share: writing options and the check of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from verifier.errors import UsageError
from verifier.files import require_writable

if TYPE_CHECKING:
    from verifier.findings import Report
    from verifier.manifest import Manifest

Command = TypeVar("Command", bound=Callable[..., Any])


def writing_options(command: Command) -> Command:
    """Add the options of every command that writes a checkpoint."""
    for option in (
        click.option(
            "--json-report",
            "--report",
            "report_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Write the summary and the check to FILE as JSON.",
        ),
        click.option(
            "--workers",
            metavar="N",
            type=click.IntRange(1, 64),
            help="Shards written at a time. [default: number of CPUs, max 4]",
        ),
        click.option("--overwrite", is_flag=True, help="Replace an existing OUT."),
    ):
        command = option(command)
    return command


def require_report_file(report_file: Path | None, out: str) -> None:
    """Refuse a report file that cannot be written, before an export runs for hours.

    Raises:
        UsageError: it is OUT or a directory, or cannot be written.
    """
    if report_file is None:
        return
    target = Path(out).resolve()
    if report_file.resolve() == target:
        raise UsageError(f"{report_file}: is OUT; --json-report takes a file")
    if not report_file.parent.resolve().is_relative_to(target):  # OUT does not exist yet
        require_writable(report_file)


@dataclass
class Result:
    """A written checkpoint: its manifest, the check of it, and the file that gets both as JSON."""

    manifest: Manifest
    report: Report
    file: Path | None

    def write(self, **more: Any) -> None:
        """Write the JSON file, with further entries."""
        from verifier.report import render_json  # noqa: PLC0415  (numpy)

        if self.file is None:
            return
        value = {
            "manifest": self.manifest.model_dump(mode="json"),
            "check": json.loads(render_json(self.report)),
            **more,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)  # it may be in OUT
        self.file.write_text(json.dumps(value, indent=2) + "\n")


def check_result(
    manifest: Manifest,
    out: str,
    *,
    base: str | None = None,
    merged_from: str | None = None,
    report_file: Path | None = None,
) -> Result:
    """Check what was written, print the report, and write both as JSON where a file is given."""
    import verifier  # noqa: PLC0415  (numpy)
    from verifier.report import render_text  # noqa: PLC0415

    report = verifier.check(out, base=base, merged_from=merged_from, depth="payload")
    click.echo(render_text(report), nl=False)
    result = Result(manifest, report, report_file)
    result.write()
    return result
