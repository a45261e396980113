# SPDX-License-Identifier: Apache-2.0
"""``ckptgate check``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from verifier.cli.evaluating import EVAL_RENAMED, eval_options, evaluate_of
from verifier.cli.loading import engine_of, engine_options
from verifier.cli.main import explain_failure, print_failure, wants_traceback
from verifier.cli.options import (
    BASE,
    DEPTHS,
    MERGED_FROM,
    PLUGIN,
    RUNNERS,
    SETTINGS,
    depth,
)
from verifier.cli.outputs import (
    STDOUT,
    TEXT,
    Output,
    Paired,
    output_options,
    outputs,
    require,
    require_several,
    targets_of,
    write_files,
    write_stdout,
)
from verifier.cli.progress import progress_bar, traffic_of
from verifier.cli.recording import (
    Recording,
    record,
    recording_options,
    require_recordable,
    worst_code,
)
from verifier.cli.runners import runner_given
from verifier.cli.settings import check_arguments, effective_settings
from verifier.cli.terminal import note, on_interrupt
from verifier.errors import ContentError, MachineError, NotACheckpointError, UsageError
from verifier.findings import Finding, Report
from verifier.summary import Summary

DIRECT = (
    "base",
    "merged_from",
    "plugins",
    "depth",
    "tp",
    "ep",
    "workers",
    "subset",
    "sample",
    "seed",
)
"""Options that `verifier.check` takes as they are; others may come from a configuration file."""


@click.command(cls=Paired, renamed=EVAL_RENAMED)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@BASE
@MERGED_FROM
@PLUGIN
@depth(
    *DEPTHS,
    explanation="header: names, shapes, dtypes, configs. payload: also every scale and "
    "pass-through tensor, and with --base every quantized weight. load: also load the model with "
    "transformers. engine: load it with vLLM's own loader instead, on a CPU. eval: also score "
    "text with candidate and base, as `ckptgate gate` does.",
)
@click.option(
    "--tp", metavar="N", type=click.IntRange(1, 65536), help="Tensor-parallel size you serve with."
)
@click.option(
    "--ep", metavar="N", type=click.IntRange(1, 65536), help="Expert-parallel size you serve with."
)
@click.option(
    "--workers",
    metavar="N",
    type=int,
    help="Processes that read shards.  [default: number of CPUs, max 4]",
)
@click.option(
    "--subset",
    metavar="K/N",
    help="Read part K of N of the modules; merge-reports combines the N reports.",
)
@RUNNERS
@click.option(
    "--records",
    metavar="PLACE",
    help="Folder or object store that all machines see; keeps the reports of --units and --ray.",
)
@click.option(
    "--sample", metavar="P%", help="Check a random P% of modules, at least one of each kind."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of --sample.")
@click.option("--statistics", is_flag=True, help="Print the number of findings per rule instead.")
@click.option(
    "--exit-zero", is_flag=True, help="Exit with 0 also where a check failed or is inconclusive."
)
@engine_options
@eval_options
@SETTINGS
@output_options
@recording_options
@click.pass_context
def check(
    ctx: click.Context,
    /,
    paths: tuple[str, ...],
    files: tuple[str, ...],
    recording: Recording,
    *,
    statistics: bool,
    exit_zero: bool,
    **options: Any,
) -> None:
    """Check the checkpoint at each PATH: a directory, hf://ORG/MODEL[@REVISION][/DIRECTORY],
    ORG/MODEL, https://..., s3://... or gs://... (docs/remote.md).

    Exit codes: 0 passed, 1 failed, 2 usage error, 3 inconclusive (nothing quantized, something not
    checked, or a required rule checked nothing), 4 I/O or internal error. Of several checkpoints
    the most severe counts.
    """
    from verifier.checkpoint.opening import sources_kept  # noqa: PLC0415  (numpy, as below)

    engine = engine_of(options["depth"], options)
    evaluate = evaluate_of(options["depth"], options["base"], options)
    settings, file = effective_settings(options)
    targets = outputs(settings["formats"].value, files)
    if len(paths) > 1:
        require_several(targets)
        if recording.golden is not None:
            raise UsageError("--golden is a record of one checkpoint; give one PATH")
    if statistics and any(t.format not in TEXT for t in targets if t.file == STDOUT):
        raise UsageError("--statistics prints text; give the other --format a file")
    require(targets)
    require_recordable(recording)
    arguments = {name: options[name] for name in DIRECT} | check_arguments(settings)
    given = runner_given(
        options["units"], options["ray"], label="checking", workers=options["workers"]
    )
    records = None
    if given is not None:
        from verifier.cli.units import CheckJob, require_records  # noqa: PLC0415  (few are divided)

        records = require_records(paths, options)
    on_interrupt(
        "no report was written"
        if records is None
        else f"finished parts are kept in {records}; run the same command again to resume"
    )
    runner = ctx.with_resource(given) if given is not None else None
    sources = ctx.with_resource(sources_kept())
    codes = []
    for path in paths:
        with progress_bar("checking", unit="byte", more=traffic_of(sources)) as progress:
            more = {"evaluate": evaluate, "engine": engine, "progress": progress}
            if runner is not None and records is not None:
                report = runner(CheckJob.for_runner(runner, path, arguments | more, records))
                if report is None:
                    note(f"part {options['units']} is done; the last part to end writes the report")
                    ctx.exit(0)
                result = _CheckedPath(_configured(report, file))
            else:
                result = _checked(path, arguments | more, file)
        own_targets = targets_of(targets, path) if len(paths) > 1 else targets
        codes.append(_written(result, own_targets, recording, statistics, alone=len(paths) == 1))
    code = worst_code(*codes)
    ctx.exit(0 if exit_zero and code in (1, 3) else code)


@dataclass(frozen=True, slots=True)
class _CheckedPath:
    """A report, and the error where no check could be made."""

    report: Report
    failure: Exception | None = None


def _checked(path: str, arguments: Mapping[str, Any], config: Path | None) -> _CheckedPath:
    report, failure = _report(path, arguments)
    return _CheckedPath(_configured(report, config), failure)


def _configured(report: Report, config: Path | None) -> Report:
    if config is None:
        return report
    return replace(report, summary=replace(report.summary, config=str(config)))


def _written(
    result: _CheckedPath,
    targets: Sequence[Output],
    recording: Recording,
    statistics: bool,
    *,
    alone: bool,
) -> int:
    """Write and record the report, and return the exit code.

    Raises:
        Exception: no check could be made of the only checkpoint, and no program reads stdout.
    """
    report, failure = result.report, result.failure
    try:
        write_files(report, targets)
    except MachineError as error:
        report, failure = _without_findings(report.uri, report.base, str(error)), error
    if failure is not None and not any(t.file == STDOUT and t.format not in TEXT for t in targets):
        # The message goes to stderr; a program that parses stdout gets a report in any case.
        record(report, report.exit_code, replace(recording, golden=None))
        if alone:
            raise failure
        print_failure(explain_failure(failure))
        return report.exit_code
    write_stdout(report, targets, statistics=statistics)
    return record(report, report.exit_code, recording)


def _report(path: str, arguments: Mapping[str, Any]) -> tuple[Report, Exception | None]:
    """Return the report, and the error if no check could be made of it.

    Raises:
        UsageError: the call is wrong.
        Exception: an internal error, if the user asks for its traceback.
    """
    from verifier.run import check as check_checkpoint  # noqa: PLC0415  (numpy; --help needs it not)

    base = arguments["base"]
    try:
        return check_checkpoint(path, **arguments), None
    except NotACheckpointError as error:
        option = _option_of(error.uri, path, arguments)
        raise UsageError(f"{option}{error}") from error
    except UsageError:
        raise
    except ContentError as error:  # of the base; a problem of the checkpoint itself is a finding
        finding = Finding("QC104", "error", str(error))
        return Report("failed", path, base, (finding,), (), Summary(error=str(error))), error
    except Exception as error:
        if wants_traceback(error):
            raise
        return _without_findings(path, base, explain_failure(error)), error


def _option_of(uri: str, path: str, arguments: Mapping[str, Any]) -> str:
    """Return ``--base `` or ``--merged-from `` where an address came from that option, else ''."""
    for name, option in (("base", "--base "), ("merged_from", "--merged-from ")):
        if arguments[name] is not None and uri == str(arguments[name]) != path:
            return option
    return ""


def _without_findings(path: str, base: str | None, error: str) -> Report:
    return Report("error", path, base, (), (), Summary(error=error))
