# SPDX-License-Identifier: Apache-2.0
"""``ckptgate selftest``."""

from __future__ import annotations

import json

import click

from verifier.cli.progress import progress_bar
from verifier.cli.results import RESULT, write_result
from verifier.cli.spellings import RenamedOptions
from verifier.selftest.runner import as_json, lines
from verifier.selftest.runner import selftest as run


@click.command(cls=RenamedOptions, renamed={"--json": ("--format", "json")})
@click.option(
    "--rule", "rules", metavar="RULE", multiple=True, help="Verify this rule only; repeatable."
)
@RESULT
@click.pass_context
def selftest(ctx: click.Context, rules: tuple[str, ...], format_: str) -> None:
    """Verify every rule on this machine: valid tiny checkpoints pass, and every injected defect is
    caught.

    Nothing is downloaded and no file is left behind. Exit codes: 0 all verified, 1 otherwise, 2
    usage error.
    """
    with progress_bar("verifying rules", unit="checkpoint") as progress:
        result = run([r.upper() for r in rules], progress=progress)
    text = json.dumps(as_json(result), indent=2) if format_ == "json" else "\n".join(lines(result))
    write_result(f"{text}\n")
    ctx.exit(0 if result.passed else 1)
