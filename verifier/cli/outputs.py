# SPDX-License-Identifier: Apache-2.0
"""Where reports go: ``--format F [-o FILE]``, ``--format F=FILE``, ``-o FILE`` and ``formats`` of a
configuration file.

``-o`` applies to the ``--format`` before it; without one, the file's ending says the format. At
most one report may use stdout, so that stdout stays machine-readable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import click

from verifier.cli.options import OVERWRITE, REPLACED, together
from verifier.cli.spellings import RenamedOptions
from verifier.cli.terminal import note, terminal
from verifier.errors import MachineError, MissingExtra, UsageError
from verifier.files import require_writable, write_atomic
from verifier.findings import Report

STDOUT = "-"
NAMES = ("text", "concise", "json", "junit", "sarif", "github", "markdown", "html")
"""`verifier.report.FORMATS`, which --help must not import; a test compares them."""
TEXT = ("text", "concise")
"""Formats for people."""
LINES = (*TEXT, "github")
"""Formats of which several reports may follow one another."""
ENDINGS = {
    ".txt": "text",
    ".json": "json",
    ".xml": "junit",
    ".sarif": "sarif",
    ".md": "markdown",
    ".html": "html",
}
_ORDER = "ckptgate.order"


@dataclass(frozen=True, slots=True)
class Output:
    """One report: its format, and a file or ``-`` for stdout."""

    format: str
    file: str = STDOUT


class Paired(RenamedOptions):
    """A command that remembers the order of ``--format`` and ``-o``; click keeps the order of each
    option only.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Store the order, then parse."""
        args = list(self._current(args))
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_ORDER] = [p.name for p in order if p.name in ("formats", "files")]
        return super().parse_args(ctx, args)


def _known(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        name, equals, file = text.partition("=")
        if name not in NAMES:
            raise click.BadParameter(f"unknown format {name!r}; one of {', '.join(NAMES)}")
        if equals and not file:
            raise click.BadParameter(f"{text!r} has no file after '='")
    return value


output_options = together(
    click.option(
        "--format",
        "formats",
        metavar="F[=FILE]",
        multiple=True,
        callback=_known,
        help=f"{', '.join(NAMES)}; repeatable.  [default: text]",
    ),
    click.option(
        "-o",
        "--output",
        "files",
        metavar="FILE",
        multiple=True,
        help="Write the preceding --format to FILE; alone, in the format of its ending "
        f"({', '.join(ENDINGS)}).  [default: stdout]",
    ),
    REPLACED,
)
"""``--format`` and ``-o``; the command is a `Paired` one."""


def result_options(*formats: str) -> Callable[[Any], Any]:
    """Return ``--format``, ``-o`` and ``--overwrite`` of a result in some formats, the default
    first; the command is a `Paired` one.
    """
    endings = ", ".join(ending for ending, name in ENDINGS.items() if name in formats)
    return together(
        click.option(
            "--format",
            "formats",
            metavar="F[=FILE]",
            multiple=True,
            help=f"{', '.join(formats)}; repeatable.  [default: {formats[0]}]",
        ),
        click.option(
            "-o",
            "--output",
            "files",
            metavar="FILE",
            multiple=True,
            help="Write the preceding --format to FILE; alone, in the format of its ending "
            f"({endings}).  [default: stdout]",
        ),
        OVERWRITE,
    )


def result_outputs(
    known: Sequence[str], formats: Sequence[str], files: Sequence[str], *, overwrite: bool
) -> tuple[Output, ...]:
    """Return where a result in some of the ``known`` formats goes, checked before any work is done.

    Raises:
        UsageError: an unknown format, or a file that exists or cannot be written.
        MissingExtra: the page needs jinja2.
    """
    targets = outputs(formats, files)
    for target in targets:
        if target.format not in known:
            raise UsageError(f"unknown format {target.format!r}; one of {', '.join(known)}")
        if target.format == "html" and find_spec("jinja2") is None:
            raise MissingExtra("--format html", "report")
        if target.file != STDOUT:
            if os.path.exists(target.file) and not overwrite:
                raise UsageError(f"{target.file} already exists; use --overwrite to replace it")
            require_writable(target.file)
    return targets


def on_stdout(targets: Sequence[Output]) -> str:
    """Return the format that goes to stdout, empty where none does."""
    return next((target.format for target in targets if target.file == STDOUT), "")


def write_result(targets: Sequence[Output], render: Callable[[str], str]) -> None:
    """Write what ``render`` returns for each target's format.

    Raises:
        MachineError: a file could not be written.
    """
    for target in targets:
        text = render(target.format)
        if target.file == STDOUT:
            click.echo(text, nl=False)
        else:
            write_atomic(target.file, text)


def outputs(formats: Sequence[str], files: Sequence[str] = ()) -> tuple[Output, ...]:
    """Return the reports to write, each with its target.

    Args:
        formats: ``F`` or ``F=FILE``, from the command line or a configuration file.
        files: the values of ``-o``, in order.

    Raises:
        UsageError: ``-o`` without a format before it and with an unknown ending, or two reports for
            one target.
    """
    pending_formats, pending_files = iter(formats), iter(files)
    ctx = click.get_current_context(silent=True)
    order = ctx.meta.get(_ORDER, []) if ctx is not None and files else ["formats"] * len(formats)
    result: list[Output] = []
    takes_file = False
    for option in order:
        if option == "formats":
            name, _, file = next(pending_formats).partition("=")
            result.append(Output(name, file or STDOUT))
            takes_file = not file
            continue
        file = next(pending_files)
        if takes_file and file:
            result[-1] = Output(result[-1].format, file)
        else:
            result.append(Output(format_of(file), file))
        takes_file = False
    _require_distinct(result)
    return tuple(result) or (Output("text"),)


def format_of(file: str) -> str:
    """Return the format that a file's ending stands for.

    Raises:
        UsageError: the ending is unknown.
    """
    ending = os.path.splitext(file)[1].lower()
    if ending not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise UsageError(f"-o {file}: its ending says no format ({known}); put --format before it")
    return ENDINGS[ending]


NAME = "{name}"
"""Stands for the checkpoint's directory name in the files of a check of several checkpoints."""


def require_several(targets: Sequence[Output]) -> None:
    """Refuse outputs that hold one report only, for a check of several checkpoints.

    Raises:
        UsageError: a document on stdout, or a file without ``{name}``.
    """
    for output in targets:
        if output.file == STDOUT and output.format not in LINES:
            raise UsageError(
                f"--format {output.format} is one document for one checkpoint; for several, give "
                f"it files: --format {output.format}=report-{NAME}"
            )
        if output.file != STDOUT and NAME not in output.file:
            raise UsageError(
                f"{output.file}: the reports of several checkpoints need a file each; {NAME} in "
                "its name stands for the directory"
            )


def targets_of(targets: Sequence[Output], path: str) -> tuple[Output, ...]:
    """Return the targets of one of several checkpoints."""
    name = os.path.basename(path.rstrip("/")) or "checkpoint"
    return tuple(Output(o.format, o.file.replace(NAME, name)) for o in targets)


def _require_distinct(targets: Sequence[Output]) -> None:
    seen: dict[str, str] = {}
    for output in targets:
        target = output.file if output.file == STDOUT else os.path.realpath(output.file)
        if target in seen:
            both = f"{seen[target]} and {output.format}"
            if target == STDOUT:
                raise UsageError(
                    f"{both} both go to stdout; give all but one a file: --format sarif=out.sarif"
                )
            raise UsageError(f"{both} both go to {output.file}")
        seen[target] = output.format


def require(targets: Sequence[Output]) -> None:
    """Check, before any work is done, that every report can be written.

    Raises:
        UsageError: a path is a directory or is not writable.
        MissingExtra: a format needs a package that is not installed.
    """
    from verifier import report  # noqa: PLC0415  (numpy; --help needs it not)

    for output in targets:
        report.require(output.format)
        if output.file != STDOUT:
            require_writable(output.file)


def write_files(report: Report, targets: Sequence[Output]) -> None:
    """Write the reports that go to files; for ``github`` also the step summary in
    $GITHUB_STEP_SUMMARY.

    Raises:
        MachineError: a file could not be written.
    """
    for output in targets:
        if output.file != STDOUT:
            write_atomic(output.file, _rendered(report, output.format))
            if sys.stderr.isatty():
                note(f"wrote {output.file}")
    if any(o.format == "github" for o in targets):
        _append_summary(report)


def write_stdout(report: Report, targets: Sequence[Output], *, statistics: bool = False) -> None:
    """Write the report that goes to stdout, if any; with ``statistics``, counts per rule in its
    place.
    """
    for output in targets:
        if output.file != STDOUT:
            continue
        if statistics:
            from verifier.report.text import statistics as counts  # noqa: PLC0415  (numpy)

            text = counts(report)
        else:
            color = terminal().color_of(sys.stdout)
            text = _rendered(report, output.format, color=color, verbose=terminal().verbose)
        click.echo(text, nl=False, color=True)


def _rendered(report: Report, format_: str, *, color: bool = False, verbose: bool = False) -> str:
    from verifier.report import render  # noqa: PLC0415  (numpy; --help needs it not)

    return render(report, format_, color=color, verbose=verbose)


def _append_summary(report: Report) -> None:
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    try:
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(_rendered(report, "markdown"))
    except OSError as error:
        raise MachineError(f"$GITHUB_STEP_SUMMARY {file}: {error.strerror or error}") from error
