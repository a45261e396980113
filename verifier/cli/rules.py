# SPDX-License-Identifier: Apache-2.0
"""``ckptgate rules`` and ``ckptgate explain``."""

from __future__ import annotations

import json
from typing import Any

import click

from verifier.cli.options import FORMAT, PLUGIN
from verifier.errors import UsageError
from verifier.rules import Rule, all_rules

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
@FORMAT
@click.option("--json", "format_", flag_value="json", help="Same as --format json.")
@PLUGIN
def rules(format_: str, plugins: tuple[str, ...]) -> None:
    """List every rule with its severity, depth and title, including those of plugins."""
    table = all_rules(plugins).values()
    if format_ == "json":
        click.echo(json.dumps([_as_json(rule) for rule in table], indent=2))
        return
    for rule in table:
        needs = f"  (needs {_inputs(rule.needs[0])})" if rule.needs else ""
        click.echo(f"{rule.id}  {rule.severity:7}  {rule.depth:7}  {rule.title}{needs}")


def _as_json(rule: Rule) -> dict[str, Any]:
    engines = {e: {"severity": level, "what": what} for e, (level, what) in rule.engines.items()}
    return {name: getattr(rule, name) for name in FIELDS} | {"engines": engines}


def _inputs(need: str) -> str:
    """Return ``--base or --merged-from`` for ``base|merged_from``."""
    return " or ".join(f"--{name.replace('_', '-')}" for name in need.split("|"))


@click.command()
@click.argument("rule_id", metavar="RULE")
@PLUGIN
def explain(rule_id: str, plugins: tuple[str, ...]) -> None:
    """Explain RULE: what it does, why the defect happens, its impact on engines, and the fix."""
    rule = all_rules(plugins).get(rule_id.upper())
    if rule is None:
        raise UsageError(f"unknown rule {rule_id!r}; `ckptgate rules` lists all rules")
    facts = f"{rule.severity}, depth {rule.depth}, counts {rule.unit}"
    click.echo(f"{rule.id}  {rule.title}  [{facts}]\n")
    if rule.origin:
        click.echo(f"Defined by {rule.origin}\n")
    click.echo(rule.doc)
    if rule.consumers:
        click.echo(f"\nEngines: {', '.join(rule.consumers)}")
    for engine, (severity, effect) in rule.engines.items():
        click.echo(f"  {engine:12}  {severity:7}  {effect}")
    if rule.sources:
        click.echo(f"Seen in: {', '.join(rule.sources)}")
