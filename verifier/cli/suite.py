# SPDX-License-Identifier: Apache-2.0
"""``ckptgate suite``."""

from __future__ import annotations

from functools import partial
from typing import Literal

import click

from verifier.cli.gate import BATCH_SIZE, DEVICE, WORKERS, require_device, require_installed, say
from verifier.cli.outputs import Paired, result_options, result_outputs, write_result
from verifier.cli.progress import progress_bar
from verifier.cli.recording import HISTORY, LABEL, Recording, print_warnings, require_recordable
from verifier.cli.terminal import on_interrupt
from verifier.gate.jobs import Scorer
from verifier.gate.suite import SuiteOptions, SuiteResult, read_suite, run_suite
from verifier.gate.suite.render import render_json, render_markdown, render_text

FORMATS = ("text", "markdown", "json", "html")


@click.command(cls=Paired)
@click.argument("candidate")
@click.option("--base", metavar="REF", required=True, help="The checkpoint to compare with.")
@click.option(
    "--suite",
    "suite_file",
    metavar="FILE.yaml",
    required=True,
    help="The entries: corpora and tasks of lm-eval, each with its margin.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Keep runs, unfinished work and attempts here.  [default: nothing is kept]",
)
@click.option(
    "--activations",
    type=click.Choice(["bf16", "declared", "shared"]),
    default="bf16",
    show_default=True,
    help="As for `ckptgate gate`.",
)
@DEVICE
@BATCH_SIZE
@WORKERS
@result_options(*FORMATS)
@HISTORY
@LABEL
@click.pass_context
def suite(
    ctx: click.Context,
    /,
    candidate: str,
    base: str,
    suite_file: str,
    cache: str | None,
    activations: Literal["bf16", "declared", "shared"],
    device: str,
    batch: int,
    workers: int | None,
    formats: tuple[str, ...],
    files: tuple[str, ...],
    history: str | None,
    label: str,
    *,
    overwrite: bool,
) -> None:
    """Decide whether CANDIDATE may be released: its loss, right answers and lengths over its base.

    Exit 0: every entry is shown to be within its margins. 1: one is shown to be beyond. 3:
    inconclusive.
    """
    require_installed("torch", "transformers", "scipy")
    targets = result_outputs(FORMATS, formats, files, overwrite=overwrite)
    require_recordable(Recording(history, label))
    require_device(device)
    on_interrupt(
        f"finished work is kept in {cache}; run the same command again to resume"
        if cache
        else "nothing is kept; --cache DIR keeps finished work"
    )
    with progress_bar("scoring", unit="document") as progress:
        scorer = Scorer(activations=activations)
        options = SuiteOptions(device, batch, workers, scorer, cache, progress, say)
        result = run_suite(candidate, base, read_suite(suite_file), options)
    write_result(targets, partial(_rendered, result))
    if history is not None:
        from verifier.history import append, recorded_suite  # noqa: PLC0415  (pydantic, for few runs)

        append(history, recorded_suite(result, label=label))
        print_warnings(history)
    ctx.exit(result.exit_code)


def _rendered(result: SuiteResult, format_: str) -> str:
    if format_ == "html":
        from verifier.report.suite_page import render_suite_page  # noqa: PLC0415  (an extra)

        return render_suite_page(result)
    renderers = {"text": render_text, "markdown": render_markdown, "json": render_json}
    return renderers[format_](result)
