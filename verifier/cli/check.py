# SPDX-License-Identifier: Apache-2.0
"""``ckptgate check``."""

from __future__ import annotations

import click

from verifier.errors import ContentError, MachineError
from verifier.findings import Finding, Report


@click.command()
@click.argument("uri", metavar="URI")
@click.option("--base", metavar="REF", help="The unquantized checkpoint to judge against.")
@click.option("--merged-from", metavar="VENDOR", help="The checkpoint whose bytes a mixed export keeps.")
@click.option(
    "--depth", type=click.Choice(["header", "payload"]), default="header", show_default=True,
    help="header: names, shapes, configs. payload: every scale and unquantized tensor too; with --base every weight.",
)  # fmt: skip
@click.option("--require", metavar="RULE", multiple=True, help="A rule that must run, else the verdict is unproven.")
@click.option("--fail-on", type=click.Choice(["error", "warning"]), default="error", show_default=True)
@click.option("--workers", metavar="N", type=int, help="Threads that read bytes.  [default: the processors, at most 4]")
@click.option("--subset", metavar="K/N", help="Read the K-th of N shares of the shards; `merge-reports` puts them together.")
@click.option("--sample", metavar="P%", help="Read this part of the modules only, at least one of each look.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which modules --sample takes.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def check(
    ctx: click.Context,
    uri: str,
    base: str | None,
    merged_from: str | None,
    depth: str,
    require: tuple[str, ...],
    fail_on: str,
    workers: int | None,
    subset: str | None,
    sample: str | None,
    seed: int,
    format_: str,
) -> None:
    """Judge the checkpoint in the folder URI (a path or an fsspec URL).

    Exit 0 passed, 1 failed, 2 usage, 3 unproven (nothing quantized, a required rule examined nothing), 4 broken.
    """
    # numpy and the rules cost 150 ms, and --help needs neither.
    from verifier.report import render_json, render_text  # noqa: PLC0415
    from verifier.run import check as judge  # noqa: PLC0415

    try:
        report = judge(
            uri, base=base, merged_from=merged_from, depth=depth, require=require, fail_on=fail_on,  # type: ignore[arg-type]
            workers=workers, subset=subset, sample=sample, seed=seed,
        )  # fmt: skip
    except ContentError as error:  # BASE or VENDOR is no checkpoint; what is wrong with URI is a finding of the check
        if format_ != "json":
            raise
        report = Report("failed", uri, base, (Finding("QC104", "error", str(error)),), (), {"error": str(error)})
    except MachineError as error:
        if format_ != "json":
            raise
        report = Report("broken", uri, base, (), (), {"error": str(error)})
    click.echo(render_json(report) if format_ == "json" else render_text(report), nl=False)
    ctx.exit(report.exit_code)
