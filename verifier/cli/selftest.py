# SPDX-License-Identifier: Apache-2.0
"""``ckptgate selftest``."""

from __future__ import annotations

import json

import click


@click.command()
@click.option(
    "--rule",
    "rules",
    metavar="RULE",
    multiple=True,
    help="Prove this rule only; may be given again.",
)
@click.option("--json", "as_json_", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def selftest(ctx: click.Context, rules: tuple[str, ...], as_json_: bool) -> None:
    """Prove every rule here: tiny sound checkpoints stay silent, and each known defect made in them
    is told.

    Nothing is downloaded and nothing is left behind. Exit 0 all proved, 1 otherwise, 2 usage.
    """
    # numpy and the rules cost 150 ms, and --help needs neither.
    from verifier.selftest.runner import as_json, lines  # noqa: PLC0415
    from verifier.selftest.runner import selftest as run  # noqa: PLC0415

    result = run([r.upper() for r in rules])
    if as_json_:
        click.echo(json.dumps(as_json(result), indent=2))
    else:
        for line in lines(result):
            click.echo(line)
    ctx.exit(0 if result.passed else 1)
