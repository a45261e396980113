# SPDX-License-Identifier: Apache-2.0
"""What the pre-commit hook runs: ``python -m verifier.cli.pre_commit [OPTIONS] FILE…``, a check a
folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from verifier.cli.main import run

WORST = (2, 4, 1, 3)
"""Exit codes from the one that hides others to the mildest."""
LFS = b"version https://git-lfs.github.com/spec/"


def folders(files: Sequence[str]) -> list[Path]:
    """Return the folders of the files that hold a checkpoint, each once, sorted."""
    found = {Path(f).parent for f in files}
    return sorted(
        f for f in found if any(f.glob("*.safetensors")) or any(f.glob("*.safetensors.index.json"))
    )


def pointer(folder: Path) -> Path | None:
    """Return a file of the folder that is a Git LFS pointer instead of tensors, or None."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            if handle.read(len(LFS)) == LFS:
                return file
    return None


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--depth", default="header", show_default=True)
@click.option("--require", multiple=True, metavar="RULE")
@click.option("--fail-on", default="error", show_default=True)
def main(files: tuple[str, ...], depth: str, require: tuple[str, ...], fail_on: str) -> None:
    """Check every checkpoint among the folders of FILES; end with the worst exit code."""
    from verifier.text import printable  # noqa: PLC0415  (as in main)

    options = [
        "--depth",
        depth,
        "--fail-on",
        fail_on,
        *(x for r in require for x in ("--require", r)),
    ]
    codes = set()
    for folder in folders(files):
        click.echo(f"{printable(str(folder))}:")
        missing = pointer(folder)
        if missing is not None:
            told = printable(str(missing))
            click.echo(
                f"{told}: a Git LFS pointer, so nothing can be judged; `git lfs pull` fetches the tensors"
            )
            codes.add(3)
        else:
            codes.add(run(["check", *options, "--", str(folder)]))
    sys.exit(next((c for c in WORST if c in codes), max(codes, default=0)))


if __name__ == "__main__":
    main()
