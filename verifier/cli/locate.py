# SPDX-License-Identifier: Apache-2.0
"""``ckptgate locate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.common import errors_as
from verifier.cli.gate import DEVICE, DOCUMENTS, require_device, require_installed
from verifier.cli.outputs import Paired, on_stdout, result_options, result_outputs, write_result
from verifier.cli.progress import progress_bar
from verifier.cli.terminal import on_interrupt
from verifier.gate import load_corpus
from verifier.gate.options import SEQ_LEN
from verifier.locate.options import BATCH, LocateOptions

if TYPE_CHECKING:
    from verifier.locate import LocateResult

FORMATS = ("text", "json", "html")


@click.command(cls=Paired)
@click.argument("candidate")
@click.option("--base", metavar="REF", required=True, help="The checkpoint to compare with.")
@click.option(
    "--corpus",
    metavar="NAME|FILE",
    required=True,
    help="wikitext2-test, a text file, or .jsonl of ids or text.",
)
@click.option(
    "--drift-against",
    metavar="RUN",
    help="Explain the excess over this accepted run (score --top-k 64).  [default: over what plain "
    "rounding of the base to the candidate's formats gives]",
)
@click.option(
    "--max-ratio",
    metavar="RATIO",
    help="Largest tolerated KL divergence, relative to the reference.  [default: 1.15x]",
)
@click.option(
    "--activations",
    type=click.Choice(["bf16", "declared", "shared"]),
    default="bf16",
    show_default=True,
    help="As in `ckptgate gate`.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2, 1_000_000),
    default=SEQ_LEN,
    show_default=True,
    help="Context length: tokens in a window.",
)
@DOCUMENTS
@DEVICE
@click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1, 4096),
    default=BATCH,
    show_default=True,
    help="Windows at a time.",
)
@click.option(
    "--scratch",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep hidden states in files here.  [default: in memory]",
)
@result_options(*FORMATS)
@click.pass_context
def locate(
    ctx: click.Context,
    /,
    candidate: str,
    base: str,
    formats: tuple[str, ...],
    files: tuple[str, ...],
    *,
    overwrite: bool,
    **options: Any,
) -> None:
    """Find which layer and module of CANDIDATE explain its KL divergence from the base.

    The models run layer by layer: memory holds one layer of each. Exit 0: nothing to blame. 1:
    modules are blamed. 3: inconclusive.
    """
    require_installed("torch", "transformers", "scipy")
    targets = result_outputs(FORMATS, formats, files, overwrite=overwrite)
    require_device(options["device"])
    on_interrupt("nothing is kept")
    with errors_as(on_stdout(targets)):
        result = _search(candidate, base, options)
    write_result(targets, partial(_rendered, result))
    ctx.exit(result.exit_code)


def _search(candidate: str, base: str, options: dict[str, Any]) -> LocateResult:
    from verifier.locate.run import locate as search  # noqa: PLC0415  (torch; --help needs it not)

    corpus = load_corpus(options.pop("corpus")).head(options.pop("documents"))
    with progress_bar("locating", unit="token pass") as progress:
        return search(candidate, base, LocateOptions(corpus, progress=progress, **options))


def _rendered(result: LocateResult, format_: str) -> str:
    from verifier.locate.page import render_page  # noqa: PLC0415  (as in _search)
    from verifier.locate.render import render_json, render_text  # noqa: PLC0415

    renderers = {"text": render_text, "json": render_json, "html": render_page}
    return renderers[format_](result)
