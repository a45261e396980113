# SPDX-License-Identifier: Apache-2.0
"""``ckptgate check``."""

from __future__ import annotations

from typing import Any

import click

from verifier.cli.evaluating import eval_options, evaluate_of
from verifier.cli.main import explain_failure, shows_defects
from verifier.cli.outputs import (
    STDOUT,
    Paired,
    output_options,
    outputs,
    require,
    write_files,
    write_stdout,
)
from verifier.cli.recording import record, recordable, recording_options
from verifier.cli.settings import judging, judging_options, settings
from verifier.errors import ContentError, MachineError, UsageError
from verifier.findings import Finding, Report


@click.command(cls=Paired)
@click.argument("uri", metavar="URI")
@click.option("--base", metavar="REF", help="The unquantized checkpoint to judge against.")
@click.option(
    "--merged-from", metavar="VENDOR", help="The checkpoint whose bytes a mixed export keeps."
)
@click.option(
    "--plugin", "plugins", metavar="FILE.py", multiple=True, help="A Python file of further rules."
)
@click.option(
    "--depth",
    type=click.Choice(["header", "payload", "load", "eval"]),
    default="header",
    show_default=True,
    help="header: names, shapes, configs. payload: every scale and unquantized tensor too; with --base every weight. "
    "load: the model through transformers as well. eval: text through base and candidate too, as `ckptgate gate`.",
)
@click.option(
    "--tp",
    metavar="N",
    type=click.IntRange(1, 65536),
    help="The tensor parallel size to serve with.",
)
@click.option(
    "--ep",
    metavar="N",
    type=click.IntRange(1, 65536),
    help="The expert parallel size to serve with.",
)
@click.option(
    "--workers",
    metavar="N",
    type=int,
    help="Processes that read bytes.  [default: the processors, at most 4]",
)
@click.option(
    "--subset",
    metavar="K/N",
    help="Read the K-th of N shares of the shards; `merge-reports` puts them together.",
)
@click.option(
    "--sample", metavar="P%", help="Read this part of the modules only, at least one of each look."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Which modules --sample takes."
)
@eval_options
@judging_options
@output_options
@recording_options
@click.pass_context
def check(
    ctx: click.Context,
    /,
    uri: str,
    base: str | None,
    merged_from: str | None,
    plugins: tuple[str, ...],
    depth: str,
    tp: int | None,
    ep: int | None,
    workers: int | None,
    subset: str | None,
    sample: str | None,
    seed: int,
    files: tuple[str, ...],
    history: str | None,
    label: str,
    golden: str | None,
    **given: Any,
) -> None:
    """Judge the checkpoint in the folder URI (a path or an fsspec URL).

    Exit 0 passed, 1 failed, 2 usage, 3 inconclusive (nothing quantized, a required rule examined
    nothing), 4 error (nothing is known about the checkpoint).
    """
    # numpy and the rules cost 150 ms, and --help needs neither.
    from verifier.report import render_json  # noqa: PLC0415
    from verifier.run import check as judge  # noqa: PLC0415

    evaluate = evaluate_of(depth, base, given)
    found, file = settings(given)
    wanted = outputs(found["formats"].value, files)
    require(wanted)
    recordable(history, golden, label)
    failure: Exception | None = None
    try:
        report = judge(
            uri,
            base=base,
            merged_from=merged_from,
            depth=depth,  # type: ignore[arg-type]
            tp=tp,
            ep=ep,
            plugins=plugins,
            workers=workers,
            subset=subset,
            sample=sample,
            seed=seed,
            evaluate=evaluate,
            **judging(found),
        )
    except UsageError:
        raise
    except (
        ContentError
    ) as error:  # BASE or VENDOR is no checkpoint; what is wrong with URI is a finding of the check
        report = Report(
            "failed", uri, base, (Finding("QC104", "error", str(error)),), (), {"error": str(error)}
        )
        failure = error
    except Exception as error:
        if shows_defects(error):
            raise
        report = Report("error", uri, base, (), (), {"error": explain_failure(error)})
        failure = error
    if file is not None:
        report.stats.setdefault("options", {})["config"] = str(file)
    try:
        write_files(report, wanted)
    except MachineError as error:
        report, failure = Report("error", uri, base, (), (), {"error": str(error)}), error
    # A person reads the message on stderr; what parses stdout gets one document whatever went
    # wrong.
    if failure is not None and not any(o.file == STDOUT and o.format != "text" for o in wanted):
        record(render_json(report), report.exit_code, history=history, label=label, golden=None)
        raise failure
    write_stdout(report, wanted)
    code = report.exit_code
    if history is not None or golden is not None:
        code = record(render_json(report), code, history=history, label=label, golden=golden)
    ctx.exit(code)
