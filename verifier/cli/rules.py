# SPDX-License-Identifier: Apache-2.0
"""``ckptgate rules`` and ``ckptgate explain``."""

from __future__ import annotations

import json

import click

from verifier.errors import UsageError

PLUGIN = click.option(
    "--plugin", "plugins", metavar="FILE.py", multiple=True, help="A Python file of further rules."
)
FIELDS = (
    "id",
    "title",
    "severity",
    "depth",
    "unit",
    "needs",
    "consumers",
    "sources",
    "doc",
    "origin",
    "split",
)


@click.command()
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option(
    "--json",
    "format_",
    flag_value="json",
    help="The same as --format json: every field of every rule.",
)
@PLUGIN
def rules(format_: str, plugins: tuple[str, ...]) -> None:
    """List every rule: id, severity, depth, title; those of plugins too."""
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy, see check)

    table = all_rules(plugins).values()
    if format_ == "json":
        rows = [
            {k: getattr(r, k) for k in FIELDS}
            | {
                "engines": {
                    e: {"severity": level, "what": what} for e, (level, what) in r.engines.items()
                }
            }
            for r in table
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for r in table:
        needs = (
            f"  (needs {' or '.join('--' + n.replace('_', '-') for n in r.needs[0].split('|'))})"
            if r.needs
            else ""
        )
        click.echo(f"{r.id}  {r.severity:7}  {r.depth:7}  {r.title}{needs}")


@click.command()
@click.argument("rule_id", metavar="RULE")
@PLUGIN
def explain(rule_id: str, plugins: tuple[str, ...]) -> None:
    """Print what RULE means, why it matters, which engines it hurts and how to mend it."""
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy, see check)

    found = all_rules(plugins).get(rule_id.upper())
    if found is None:
        raise UsageError(f"no rule {rule_id!r}; `ckptgate rules` lists them")
    click.echo(
        f"{found.id}  {found.title}  [{found.severity}, depth {found.depth}, counts {found.unit}]\n"
    )
    if found.origin:
        click.echo(f"A rule of {found.origin}\n")
    click.echo(found.doc)
    click.echo(f"\nEngines: {', '.join(found.consumers)}")
    for engine, (severity, what) in found.engines.items():
        click.echo(f"  {engine:12}  {severity:7}  {what}")
    click.echo(f"Seen in: {', '.join(found.sources)}")
