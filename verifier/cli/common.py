# SPDX-License-Identifier: Apache-2.0
"""A progress bar, and errors as JSON, for the commands that read checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from verifier.errors import CkptgateError, UsageError
from verifier.text import counted, size

if TYPE_CHECKING:
    from verifier.checkpoint.address import Address
    from verifier.checkpoint.source import Source


@contextmanager
def errors_as(format_: str) -> Iterator[None]:
    """With the format ``json``, print an error as ``{"error": …}`` on stdout; exit with its code.

    A usage error stays a message on stderr.
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
    """Yield a callback (done, total) that draws a bar on a terminal; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars  # noqa: PLC0415  (needed on a terminal only)
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn() if in_bytes else bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def fetch_bar(label: str, sources: Mapping[Address, Source]) -> Iterator[None]:
    """Show on a terminal what remote sources fetch inside the block."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 (of use on a terminal only)
    from rich.live import Live  # noqa: PLC0415

    def line() -> str:
        amounts = [s.traffic() for s in list(sources.values())]
        nbytes, requests = sum(a.nbytes for a in amounts), sum(a.requests for a in amounts)
        return f"{label}: {size(nbytes)} in {counted(requests, 'request')}" if requests else ""

    console = Console(stderr=True)
    with Live(get_renderable=line, console=console, transient=True, refresh_per_second=5):
        yield
