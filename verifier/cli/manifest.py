# SPDX-License-Identifier: Apache-2.0
"""``ckptgate manifest``."""

from __future__ import annotations

import click

from verifier.cli.common import errors_as
from verifier.cli.groups import CommandGroup
from verifier.cli.results import RESULT, write_result
from verifier.published import compare_published, published_json, published_text, read_manifest


@click.group(cls=CommandGroup)
def manifest() -> None:
    """Compare published files with the manifest of an export."""


@manifest.command()
@click.argument("path")
@click.option(
    "--manifest",
    "file",
    metavar="FILE",
    required=True,
    help="Your own ckptgate_manifest.json, from the directory that you checked.",
)
@click.option(
    "--read-all",
    is_flag=True,
    help="Read large files too where the server knows no SHA-256 (object stores, web servers).",
)
@RESULT
@click.pass_context
def verify(ctx: click.Context, path: str, file: str, read_all: bool, format_: str) -> None:
    """Compare the files at PATH, usually an address, with a manifest.

    The hub knows the SHA-256 of weights, so they are compared without a download. Small files are
    read.

    Exit codes: 0 all equal, 1 a file differs, is missing or is not in the manifest, 3 a file could
    be compared by size only.
    """
    with errors_as(format_):
        result = compare_published(path, read_manifest(file), read_all=read_all)
    write_result(published_json(result) if format_ == "json" else published_text(result))
    ctx.exit(result.exit_code)
