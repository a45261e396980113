# SPDX-License-Identifier: Apache-2.0
"""``ckptgate calibrate``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import click

from verifier.cli.options import OVERWRITE
from verifier.cli.progress import progress_bar
from verifier.cli.terminal import on_interrupt
from verifier.errors import MissingExtra, UsageError

FALLBACK = click.Choice(["fallback", "error"])
SET_BY_EXPORT = ("--recipe", "--texts", "-o", "--output", "--overwrite", "--kv")
"""Options of calibrate that export sets."""


@click.command(short_help="Measure activation maxima of the modules that a recipe quantizes.")
@click.argument("source")
@click.option("--recipe", required=True, help="Name of a recipe, or a YAML file.")
@click.option(
    "--texts",
    metavar="FILE",
    multiple=True,
    required=True,
    help="Documents: text, or .jsonl of text or ids.",
)
@click.option(
    "--samples",
    metavar="512,256",
    required=True,
    help="Sequences to take, one number per --texts.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2, 10_000_000),
    default=2048,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Sequences at a time.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Decides which documents are taken.",
)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="FILE",
    required=True,
    help="The stats file to write (safetensors).",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    show_default=True,
    help="Where the model runs; auto uses every GPU.",
)
@click.option(
    "--method",
    type=click.Choice(["max", "percentile"]),
    default="max",
    show_default=True,
    help="Statistic of a module's inputs.",
)
@click.option(
    "--percentile", type=float, default=99.9, show_default=True, help="For --method percentile."
)
@click.option(
    "--on-bad-stat",
    type=FALLBACK,
    default="error",
    show_default=True,
    help="What to do about zero, NaN, infinite, tiny or huge statistics.",
)
@click.option(
    "--on-dead-expert",
    type=FALLBACK,
    default="fallback",
    show_default=True,
    help="What to do about experts without tokens.",
)
@click.option(
    "--min-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Warn about experts with fewer tokens.",
)
@click.option(
    "--kv",
    is_flag=True,
    help="Measure KV maxima also for a recipe without static activation scales.",
)
@OVERWRITE
def calibrate(source: str, out: str, samples: str, **options: Any) -> None:
    """Run texts through the model SOURCE and write each module's largest input, by hub name.

    Pass the file to `export --stats`. Exit 0: written, with warnings and fallbacks listed. 1:
    refused.
    """
    counts = _numbers(samples)
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtra("calibrate", "load")
    from exporter import calibration  # noqa: PLC0415  (torch and transformers cost seconds)

    on_interrupt("no stats file was written")
    with progress_bar("calibrating", unit="sequence") as progress:
        report = calibration.calibrate(source, out, samples=counts, progress=progress, **options)
    click.echo(calibration.render_text(report), nl=False)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--samples {text}: use integers separated by commas") from error


def calibrate_within_export(
    source: str,
    out: str,
    texts: tuple[str, ...],
    more: tuple[str, ...],
    options: Mapping[str, Any],
) -> str:
    """Run calibrate for an export, and return the stats file, which stays next to OUT.

    Args:
        source: of the export.
        out: of the export.
        texts: files of documents.
        more: arguments for calibrate.
        options: of the export, by parameter name.

    Raises:
        UsageError: an option of calibrate that export sets, or one of export that contradicts.
    """
    for name, option in (("stats", "--stats"), ("input_scale", "--input-scale")):
        if options[name] is not None:
            raise UsageError(f"--calibrate-texts and {option} contradict; pass one of them")
    for word in more:
        short = word.startswith("-o") and not word.startswith("--")
        if short or word.split("=")[0] in SET_BY_EXPORT:
            raise UsageError(f"{word}: export sets this option of calibrate")
    if os.path.lexists(out) and not options["overwrite"]:
        raise UsageError(f"{out}: already exists; use --overwrite to replace it")
    stats = os.path.normpath(out) + ".stats.safetensors"
    arguments = [source, "--recipe", options["recipe"], "-o", stats, *more]
    for text in texts:
        arguments += ["--texts", text]
    if options["overwrite"]:
        arguments.append("--overwrite")
    if options["kv_cache"] == "fp8":
        arguments.append("--kv")
    with calibrate.make_context("calibrate", arguments) as context:
        calibrate.invoke(context)
    return stats
