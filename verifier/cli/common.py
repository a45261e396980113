# SPDX-License-Identifier: Apache-2.0
"""What the commands that look at checkpoints share: a bar of bytes, and errors where stdout must be
JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from verifier.errors import CkptgateError, UsageError


@contextmanager
def errors_as(format_: str) -> Iterator[None]:
    """Where the format is json, print an error as ``{"error": …}`` on stdout and end with its exit
    code.

    A wrong call stays a message on stderr.
    """
    try:
        yield
    except UsageError:
        raise
    except CkptgateError as error:
        if format_ != "json":
            raise
        click.echo(json.dumps({"error": str(error)}, indent=2))
        raise click.exceptions.Exit(error.exit_code) from error


@contextmanager
def progress_bar(
    label: str, *, in_bytes: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback (done, in all) that draws a bar on a terminal, and None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  (of use on a terminal only)
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415
    from rich.progress import TimeRemainingColumn as Remaining  # noqa: PLC0415

    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
