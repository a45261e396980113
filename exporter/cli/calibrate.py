# SPDX-License-Identifier: Apache-2.0
"""``ckptgate calibrate``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import click

from verifier.cli.common import progress_bar
from verifier.errors import MissingExtra, UsageError

FALLBACK = click.Choice(["fallback", "error"])


@click.command()
@click.argument("source")
@click.option("--recipe", required=True, help="A recipe's name, or a YAML file.")
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
    help="Sequences to take, one number for each --texts.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2, 10_000_000),
    default=2048,
    show_default=True,
    help="Tokens in a sequence.",
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
    "--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True
)
@click.option(
    "--method", type=click.Choice(["max", "percentile"]), default="max", show_default=True
)
@click.option(
    "--percentile", type=float, default=99.9, show_default=True, help="With --method percentile."
)
@click.option(
    "--on-bad-stat",
    type=FALLBACK,
    default="error",
    show_default=True,
    help="Zero, NaN, infinite, tiny, huge.",
)
@click.option(
    "--on-dead-expert",
    type=FALLBACK,
    default="fallback",
    show_default=True,
    help="Experts without tokens.",
)
@click.option(
    "--min-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Warn of experts with fewer.",
)
@click.option(
    "--kv",
    is_flag=True,
    help="KV maxima are wanted, also by a recipe without static activation scales.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing stats file.")
def calibrate(
    source: str,
    recipe: str,
    texts: tuple[str, ...],
    samples: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    out: str,
    device: str,
    method: str,
    percentile: float,
    on_bad_stat: str,
    on_dead_expert: str,
    min_tokens: int,
    kv: bool,
    overwrite: bool,
) -> None:
    """Run texts through the model in SOURCE and write each module's largest input, by hub name.

    The file is what `export --stats` takes. Exit 0: written, warnings and fallbacks listed. 1:
    refused.
    """
    counts = _numbers(samples)
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtra("calibrate", "load")
    from exporter import calibration  # noqa: PLC0415  (torch and transformers cost seconds)

    with progress_bar("calibrating") as progress:
        report = calibration.calibrate(
            source,
            out,
            recipe=recipe,
            texts=texts,
            samples=counts,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            device=device,
            method=method,  # type: ignore[arg-type]
            percentile=percentile,
            on_bad_stat=on_bad_stat,  # type: ignore[arg-type]
            on_dead_expert=on_dead_expert,  # type: ignore[arg-type]
            min_tokens=min_tokens,
            kv=kv,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(calibration.render_text(report), nl=False)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--samples {text}: whole numbers with commas between them") from error


CONTROLLED = ("--recipe", "--texts", "-o", "--output", "--overwrite", "--kv")
"""Options of calibrate that export decides."""


def within_export(
    source: str,
    out: str,
    recipe: str,
    texts: tuple[str, ...],
    more: tuple[str, ...],
    given: Mapping[str, Any],
    overwrite: bool,
    dry_run: bool,
) -> str:
    """Run calibrate with what the user gave it, and return the stats file, which stays beside OUT.

    Raises:
        UsageError: an option that export controls, or that contradicts.
    """
    for other, option in (("stats", "--stats"), ("input_scale", "--input-scale")):
        if given[other] is not None:
            raise UsageError(f"--calibrate-texts and {option} contradict: give one of them")
    if dry_run:
        raise UsageError(
            "--calibrate-texts runs the model; --dry-run goes with --stats or --input-scale one"
        )
    for word in more:
        if word.split("=")[0] in CONTROLLED or (
            word.startswith("-o") and not word.startswith("--")
        ):
            raise UsageError(f"{word}: export sets this option of calibrate")
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{out}: exists; --overwrite swaps it whole")
    stats = os.path.normpath(out) + ".stats.safetensors"
    arguments = [
        source,
        "--recipe",
        recipe,
        *(w for t in texts for w in ("--texts", t)),
        "-o",
        stats,
        *more,
    ]
    if overwrite:
        arguments.append("--overwrite")
    if given["kv_cache"] == "fp8":
        arguments.append("--kv")
    with calibrate.make_context("calibrate", arguments) as inner:
        calibrate.invoke(inner)
    return stats
