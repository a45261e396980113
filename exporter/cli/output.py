# SPDX-License-Identifier: Apache-2.0
"""What `export`, `merge` and `repair` share: writing options and the check of the result."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.out import check_out, work_folder
from verifier.cli.options import OVERWRITE
from verifier.cli.progress import progress_bar
from verifier.cli.runners import runner_given
from verifier.cli.terminal import note, on_interrupt
from verifier.errors import UsageError
from verifier.files import require_writable
from verifier.progress import Progress
from verifier.text import counted

if TYPE_CHECKING:
    from exporter.plan import Plan
    from verifier.findings import Report
    from verifier.manifest import Manifest
    from verifier.units import Runner

Command = TypeVar("Command", bound=Callable[..., Any])
MAX_WORKERS = 4
"""Threads that encode and copy, where the user gives no number."""


WRITING_RENAMED = {"--report": ("--json-report",)}
"""Former spellings of `writing_options`."""


def writing_options(command: Command) -> Command:
    """Add the options of every command that writes a checkpoint."""
    for option in (
        click.option(
            "--json-report",
            "report_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Write the summary and the check to FILE as JSON.",
        ),
        click.option(
            "--workers",
            metavar="N",
            type=click.IntRange(1, 64),
            help="Threads that encode and copy. [default: number of CPUs, max 4]",
        ),
        OVERWRITE,
    ):
        command = option(command)
    return command


def _bytes(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Return the bytes that ``2GB`` or ``500MB`` names."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG])B", value)
    count = int(float(match[1]) * {"M": 10**6, "G": 10**9}[match[2]]) if match else 0
    if not count:
        raise click.BadParameter(f"{value!r}: write a size above 0 in MB or GB, such as 2GB")
    return count


SHARD_SIZE = click.option(
    "--shard-size",
    "shard_bytes",
    metavar="SIZE",
    callback=_bytes,
    help="Size at which a new shard of OUT begins, such as 2GB.  [default: 5GB]",
)
NO_CHECK = click.option(
    "--no-check", is_flag=True, help="Leave out the check of OUT; output and manifest say so."
)
UNCHECKED = {"check": "left out (--no-check)"}
"""What the manifest of an output says that was not checked."""


def require_inputs(
    out: str, *inputs: str | None, overwrite: bool, recipe: str | None = None
) -> None:
    """Refuse what is wrong with a call, before torch is imported; with ``overwrite``, OUT may be a
    checkpoint.

    Raises:
        UsageError: an input that is not a checkpoint, an OUT that cannot be written, an unknown
            recipe.
    """
    from exporter.recipes import load  # noqa: PLC0415  (numpy, which --help does not need)
    from verifier.checkpoint import open_source, require_checkpoint  # noqa: PLC0415
    from verifier.checkpoint.address import is_local  # noqa: PLC0415

    uris = [uri for uri in inputs if uri is not None]
    for uri in filter(is_local, uris):
        source = open_source(uri)
        require_checkpoint(source, source.files())
    if recipe is not None:
        load(recipe)
    check_out(Path(out), overwrite=overwrite, inputs=tuple(uris))
    folder = work_folder(Path(out))
    on_interrupt(f"finished shards are kept in {folder}; run the same command again to resume")


@contextmanager
def writing_bar(nbytes: int) -> Iterator[Callable[[int], None]]:
    """Show that a checkpoint of so many bytes is written, and yield the callback that takes the
    bytes of each finished step.
    """
    with progress_bar("writing", unit="byte") as progress:
        yield _accumulating(progress, nbytes)


def _accumulating(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a callback that takes bytes as they are written, and reports their sum."""
    written, lock = 0, threading.Lock()

    def add(nbytes: int) -> None:
        nonlocal written
        with lock:  # shards are written by threads
            written += nbytes
            progress(written, total)

    return add


def writers_given(
    options: Mapping[str, Any], writing: Mapping[str, Any]
) -> AbstractContextManager[Runner] | None:
    """Return what enters the runner that ``--units`` or ``--ray`` names, None without both.

    Raises:
        UsageError: as `runner_given`; ``--overwrite``, which several writers of one OUT cannot do.
    """
    units, ray = options["units"], options["ray"]
    given = runner_given(
        units, ray, label="writing", workers=writing["workers"], default=MAX_WORKERS
    )
    if given is not None and writing["overwrite"]:
        name = "--units" if units is not None else "--ray"
        raise UsageError(f"{name} makes a new OUT; remove the old one, not --overwrite")
    return given


def write_in_units(
    given: AbstractContextManager[Runner],
    function: Callable[..., Plan],
    arguments: Mapping[str, Any],
    out: str,
    fields: Mapping[str, Any],
) -> Manifest | None:
    """Write the shards of a plan that a function makes, or some of them; ``fields`` are further
    ones of `WriteOptions`.

    Returns:
        The manifest; None where other processes have shards left.
    """
    from exporter.units import PlanCall, WriteJob  # noqa: PLC0415  (torch)
    from exporter.writing import WriteOptions  # noqa: PLC0415

    call = PlanCall(function, tuple(arguments.items()))
    with given as runner, progress_bar("writing", unit="byte") as bar:
        progress = _accumulating(bar, 0) if runner.here else None
        options = WriteOptions(workers=runner.workers, progress=progress, **fields)
        job = WriteJob(call, Path(out), options)
        shards, parts = len(job.units()), runner.of or runner.slots
        if shards < parts:
            note(
                f"{counted(shards, 'shard')} for {parts:,} parts: a smaller --shard-size gives "
                "work to all"
            )
        manifest = runner(job)
    if manifest is None:
        note(f"this part is written; the last part to end makes {out}")
    return manifest


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
    """A written checkpoint: its manifest, the check of it if there was one, and the file that gets
    both as JSON.
    """

    manifest: Manifest
    report: Report | None
    file: Path | None

    @property
    def exit_code(self) -> int:
        """That of the check."""
        return self.report.exit_code if self.report is not None else 0

    def write(self, **more: Any) -> None:
        """Write the JSON file, with further entries."""
        from verifier.report import render_json  # noqa: PLC0415  (numpy)

        if self.file is None:
            return
        value = {
            "manifest": self.manifest.model_dump(mode="json"),
            "check": json.loads(render_json(self.report)) if self.report is not None else None,
            **more,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)  # it may be in OUT
        self.file.write_text(json.dumps(value, indent=2) + "\n")


def left_out(
    manifest: Manifest,
    out: str,
    *,
    base: str | None = None,
    merged_from: str | None = None,
    report_file: Path | None = None,
) -> Result:
    """Say that an output was not checked and how to check it, and write its manifest as JSON."""
    inputs = {"--base": base, "--merged-from": merged_from}
    against = "".join(f" {name} {uri}" for name, uri in inputs.items() if uri is not None)
    click.echo(f"not checked (--no-check): ckptgate check {out} --depth payload{against}")
    result = Result(manifest, None, report_file)
    result.write()
    return result


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

    on_interrupt(f"{out} is complete, but its check was not finished")
    with progress_bar("checking", unit="byte") as progress:
        report = verifier.check(
            out, base=base, merged_from=merged_from, depth="payload", progress=progress
        )
    click.echo(render_text(report), nl=False)
    result = Result(manifest, report, report_file)
    result.write()
    return result
