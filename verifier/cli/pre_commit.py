# SPDX-License-Identifier: Apache-2.0
"""``ckptgate pre-commit FILE…``: what the pre-commit hook runs, one check per directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from verifier.checkpoint import open_checkpoint
from verifier.cli.main import run
from verifier.errors import CkptgateError
from verifier.layouts.expert_stacks import unstacked
from verifier.quantized import QuantizedCheckpoint
from verifier.text import printable

WORST = (2, 4, 1, 3)
"""Exit codes, the most severe first."""
LFS = b"version https://git-lfs.github.com/spec/"


def checkpoints(files: Sequence[str]) -> list[Path]:
    """Return the directories of the files that hold a checkpoint, each once, sorted."""
    return sorted(
        directory
        for directory in {Path(f).parent for f in files}
        if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json"))
    )


def lfs_pointer(directory: Path) -> Path | None:
    """Return a file of the directory that is a Git LFS pointer instead of tensors, or None."""
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as handle:
            if handle.read(len(LFS)) == LFS:
                return file
    return None


@click.command("pre-commit")
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--depth", default="header", show_default=True, help="As in `ckptgate check`.")
@click.option("--require", multiple=True, metavar="RULE", help="As in `ckptgate check`.")
@click.option("--fail-on", default="error", show_default=True, help="As in `ckptgate check`.")
@click.option(
    "--require-quantized", is_flag=True, help="Check models too in which nothing is quantized."
)
@click.pass_context
def pre_commit(
    ctx: click.Context,
    files: tuple[str, ...],
    *,
    require_quantized: bool,
    depth: str,
    require: tuple[str, ...],
    fail_on: str,
) -> None:
    """Check every checkpoint among the directories of FILES; exit with the most severe code."""
    options = ["--depth", depth, "--fail-on", fail_on]
    for rule in require:
        options += ["--require", rule]
    codes = {
        _checked(directory, options, skip_unquantized=not require_quantized)
        for directory in checkpoints(files)
    }
    ctx.exit(next((c for c in WORST if c in codes), max(codes, default=0)))


def is_quantized(directory: Path) -> bool:
    """Whether something in a checkpoint is quantized, or its configs say so; true where it cannot
    be read, so that a check reports why.
    """
    try:
        stored = open_checkpoint(directory)
        declared = stored.hf_quant_config or (stored.config or {}).get("quantization_config")
        return bool(declared or QuantizedCheckpoint(unstacked(stored)).quantized_modules)
    except CkptgateError:
        return True


def _checked(directory: Path, options: list[str], *, skip_unquantized: bool) -> int:
    click.echo(f"{printable(str(directory))}:")
    pointer = lfs_pointer(directory)
    if pointer is None and skip_unquantized and not is_quantized(directory):
        click.echo("skipped: nothing in it is quantized")
        return 0
    if pointer is None:
        return run(["check", *options, "--", str(directory)])
    name = printable(str(pointer))
    click.echo(f"{name} is a Git LFS pointer; `git lfs pull` downloads the tensors")
    return 3
