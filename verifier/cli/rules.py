# SPDX-License-Identifier: Apache-2.0
"""``ckptgate rules`` and ``ckptgate explain``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Any

import click

from verifier.cli.options import FORMAT, PLUGIN, SELECT
from verifier.cli.spellings import RenamedOptions
from verifier.cli.terminal import terminal
from verifier.rules import Rule, all_rules, texts
from verifier.run.select import ALL, match, prefixes

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
    "repairable",
)


@click.command(cls=RenamedOptions, renamed={"--json": ("--format", "json")})
@FORMAT
@SELECT
@PLUGIN
def rules(format_: str, select: tuple[str, ...], plugins: tuple[str, ...]) -> None:
    """List the rules with severity, depth and title, including those of plugins."""
    table = _selected(select or (ALL,), plugins, "--select")
    if format_ == "json":
        click.echo(json.dumps([_as_json(rule) for rule in table], indent=2))
        return
    for rule in table:
        needs = f"  (needs {_inputs(rule.needs[0])})" if rule.needs else ""
        click.echo(f"{rule.id}  {rule.severity:7}  {rule.depth:7}  {rule.title}{needs}")


def _selected(texts: tuple[str, ...], plugins: tuple[str, ...], option: str) -> list[Rule]:
    """Return the rules that ids and prefixes name, in the order of the table.

    Raises:
        UsageError: one names no rule.
    """
    table = all_rules(plugins)
    wanted = prefixes(texts, table, option)
    return [rule for rule in table.values() if match(rule.id, wanted) is not None]


def _as_json(rule: Rule) -> dict[str, Any]:
    engines = {e: {"severity": level, "what": what} for e, (level, what) in rule.engines.items()}
    return {name: getattr(rule, name) for name in FIELDS} | {"engines": engines}


def _inputs(need: str) -> str:
    """Return ``--base or --merged-from`` for ``base|merged_from``."""
    return " or ".join(f"--{name.replace('_', '-')}" for name in need.split("|"))


@click.command()
@click.argument("names", metavar="RULE...", nargs=-1, required=True)
@FORMAT
@PLUGIN
def explain(names: tuple[str, ...], format_: str, plugins: tuple[str, ...]) -> None:
    """Explain each RULE: what it does, why the defect happens, its impact on engines, and the fix.

    RULE is an id or a prefix: QC501, QC5.
    """
    table = _selected(names, plugins, "explain")
    if format_ == "json":
        click.echo(json.dumps([_as_json(rule) for rule in table], indent=2))
        return
    color = terminal().color_of(sys.stdout)
    click.echo("\n\n".join(_explained(rule, color) for rule in table), color=True)


def _explained(rule: Rule, color: bool) -> str:
    """Return the text of a rule without markup, wrapped."""

    def bold(text: str) -> str:
        return click.style(text, bold=True) if color else text

    parts = [
        f"{bold(rule.id)}  {rule.title}",
        f"{rule.severity}, depth {rule.depth}, counts {rule.unit}",
    ]
    if rule.origin:
        parts.append(f"Defined by {rule.origin}")
    parts += ["", _wrapped(texts.plain(texts.summary(rule.doc)))]
    for title, text in texts.sections(rule.doc).items():
        parts += ["", bold(title), *(_wrapped(texts.plain(p), "  ") for p in text.split("\n\n"))]
    if rule.consumers:
        parts += ["", f"Engines: {', '.join(rule.consumers)}"]
    for engine, (severity, effect) in rule.engines.items():
        parts.append(f"  {engine:12}  {severity:7}  {effect}")
    if rule.sources:
        parts.append(f"Seen in: {', '.join(rule.sources)}")
    return "\n".join(parts)


def _wrapped(text: str, indent: str = "") -> str:
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
