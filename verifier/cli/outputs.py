# SPDX-License-Identifier: Apache-2.0
"""Where reports go: ``--format F [-o FILE]``, ``--format F=FILE``, and ``formats`` of a
configuration file.

``-o`` belongs to the ``--format`` before it. At most one report goes to stdout, so that what reads
it can parse it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from verifier.errors import MachineError, UsageError
from verifier.findings import Report

STDOUT = "-"
_ORDER = "ckptgate.order"


@dataclass(frozen=True, slots=True)
class Output:
    """One report: its format, and a file or ``-`` for stdout."""

    format: str
    file: str = STDOUT


class Paired(click.Command):
    """A command that remembers in which order ``--format`` and ``-o`` stood; click keeps that of
    each option only.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note the order, then parse."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_ORDER] = [p.name for p in order if p.name in ("formats", "files")]
        return super().parse_args(ctx, args)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--format`` and ``-o``; the command is a `Paired` one."""
    command = click.option(
        "-o",
        "--output",
        "files",
        metavar="FILE",
        multiple=True,
        help="Where the --format before it goes; stdout without.",
    )(command)
    return click.option(
        "--format",
        "formats",
        metavar="F[=FILE]",
        multiple=True,
        callback=_known,
        help="text, json, junit, sarif, github, markdown, html; repeatable. [default: text]",
    )(command)


def outputs(formats: Sequence[str], files: Sequence[str] = ()) -> tuple[Output, ...]:
    """Return the reports that are wanted, each with its target.

    Args:
        formats: ``F`` or ``F=FILE``, as given or from a configuration file.
        files: the values of ``-o``, in order.

    Raises:
        UsageError: ``-o`` without a format before it, two reports for one target.
    """
    names = iter(formats)
    given = iter(files)
    ctx = click.get_current_context(silent=True)
    order = ctx.meta.get(_ORDER, []) if ctx is not None and files else ["formats"] * len(formats)
    found: list[Output] = []
    open_ = False
    for what in order:
        if what == "formats":
            name, _, file = next(names).partition("=")
            found.append(Output(name, file or STDOUT))
            open_ = not file
        else:
            file = next(given)
            if not open_ or not file:
                raise UsageError(
                    f"-o {file}: belongs to the --format before it, which is missing or has its file already"
                )
            found[-1] = Output(found[-1].format, file)
            open_ = False
    _distinct(found)
    return tuple(found) or (Output("text"),)


def _distinct(found: Sequence[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in found:
        target = output.file if output.file == STDOUT else os.path.realpath(output.file)
        if target in seen:
            both = f"{seen[target].format} and {output.format}"
            where = (
                "stdout; give all but one a file, --format sarif=out.sarif"
                if target == STDOUT
                else output.file
            )
            raise UsageError(f"{both} both go to {where}")
        seen[target] = output


def require(wanted: Sequence[Output]) -> None:
    """Refuse, before the check runs, what cannot be written: a package is missing, a path is a
    folder.
    """
    from verifier import report  # noqa: PLC0415  (only where a command runs)
    from verifier.files import require_writable  # noqa: PLC0415

    for output in wanted:
        report.require(output.format)
        if output.file != STDOUT:
            require_writable(output.file)


def write_files(report: Report, wanted: Sequence[Output]) -> None:
    """Write the reports that go to files; for ``github`` the step summary too, where
    $GITHUB_STEP_SUMMARY names one.

    Raises:
        MachineError: a file could not be written.
    """
    from verifier.files import write_atomic  # noqa: PLC0415
    from verifier.report import render  # noqa: PLC0415  (numpy, see check)

    for output in wanted:
        if output.file != STDOUT:
            write_atomic(output.file, render(report, output.format))
            if sys.stderr.isatty():
                click.echo(f"wrote {output.file}", err=True)
    if any(o.format == "github" for o in wanted):
        _summarize(report)


def write_stdout(report: Report, wanted: Sequence[Output]) -> None:
    """Write the report that goes to stdout, if any."""
    from verifier.report import render  # noqa: PLC0415

    for output in wanted:
        if output.file == STDOUT:
            click.echo(render(report, output.format, color=colored()), nl=False, color=True)


def colored() -> bool:
    """Whether stdout is a terminal that takes colours: $NO_COLOR is not set, $TERM is not
    ``dumb``.
    """
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def _summarize(report: Report) -> None:
    from verifier.report import render  # noqa: PLC0415

    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    try:
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(render(report, "markdown"))
    except OSError as error:
        raise MachineError(f"$GITHUB_STEP_SUMMARY {file}: {error.strerror or error}") from error


def _known(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        name, equals, file = text.partition("=")
        if name not in NAMES:
            raise click.BadParameter(f"no format {name!r}; one of {', '.join(NAMES)}")
        if equals and not file:
            raise click.BadParameter(f"{text!r} names no file")
    return value


# Those of verifier.report.FORMATS, which --help must not import (a test compares them).
NAMES = ("text", "json", "junit", "sarif", "github", "markdown", "html")
