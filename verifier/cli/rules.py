# SPDX-License-Identifier: Apache-2.0
"""``ckptgate rules`` and ``ckptgate explain``."""

from __future__ import annotations

import json

import click

from verifier.errors import UsageError


@click.command()
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
def rules(format_: str) -> None:
    """List every rule: id, severity, depth, title."""
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy, see check)

    table = all_rules().values()
    if format_ == "json":
        rows = [
            {k: getattr(r, k) for k in ("id", "title", "severity", "depth", "unit", "needs", "consumers", "sources", "doc")}
            | {"engines": {e: {"severity": level, "what": what} for e, (level, what) in r.engines.items()}}
            for r in table
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for r in table:
        needs = f"  (needs {' or '.join('--' + n.replace('_', '-') for n in r.needs[0].split('|'))})" if r.needs else ""
        click.echo(f"{r.id}  {r.severity:7}  {r.depth:7}  {r.title}{needs}")


@click.command()
@click.argument("rule_id", metavar="RULE")
def explain(rule_id: str) -> None:
    """Print what RULE means, why it matters, which engines it hurts and how to mend it."""
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy, see check)

    found = all_rules().get(rule_id.upper())
    if found is None:
        raise UsageError(f"no rule {rule_id!r}; `ckptgate rules` lists them")
    click.echo(f"{found.id}  {found.title}  [{found.severity}, depth {found.depth}, counts {found.unit}]\n")
    click.echo(found.doc)
    click.echo(f"\nEngines: {', '.join(found.consumers)}")
    for engine, (severity, what) in found.engines.items():
        click.echo(f"  {engine:12}  {severity:7}  {what}")
    click.echo(f"Seen in: {', '.join(found.sources)}")
