# SPDX-License-Identifier: Apache-2.0
"""``ckptgate recipes``: list, show, explain."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.cli.groups import CommandGroup
from verifier.errors import PlanError

if TYPE_CHECKING:
    from exporter.recipes import Recipe, RecipeRule

NOT_SELECTED = "not quantized"


@click.group(cls=CommandGroup)
def recipes() -> None:
    """List recipes, show one, or explain their effect on a module."""


@recipes.command("list")
def list_() -> None:
    """List the recipes of the package."""
    from exporter.recipes import load, names  # noqa: PLC0415  (numpy, and the root help lists this command)

    loaded = [load(n) for n in names()]
    width = max(len(r.name) for r in loaded)
    for recipe in loaded:
        click.echo(f"{recipe.name:{width}}  {recipe.description}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME (a name, or a YAML file) after checking it."""
    from exporter.recipes import load, names  # noqa: PLC0415  (as above)

    load(name)
    file = Path(name) if name not in names() else None
    text = (file or resources.files("exporter.recipes") / f"{name}.yaml").read_text(
        encoding="utf-8"
    )
    click.echo(text.rstrip())


@recipes.command()
@click.argument("module")
@click.option(
    "--recipe",
    "name",
    help="Explain one recipe (a name or a YAML file) rule by rule, instead of all.",
)
@click.option("--source", metavar="DIR", help="A checkpoint; MODULE must be one of its modules.")
def explain(module: str, name: str | None, source: str | None) -> None:
    """Show the effect of recipes on MODULE, a full hub name, and which rule decides."""
    from exporter.recipes import PROTECTED, load, names  # noqa: PLC0415  (as above)
    from verifier.schemes import role  # noqa: PLC0415

    if source is not None:
        _require_module(module, source)
    module_role = role(module)
    protected = "; wildcards never match it" if module_role in PROTECTED else ""
    click.echo(f"{module}: role {module_role}{protected}")
    if name is not None:
        click.echo("\n".join(_rules(load(name), module)))
        return
    loaded = [load(n) for n in names()]
    width = max(len(r.name) for r in loaded)
    for recipe in loaded:
        click.echo(f"  {recipe.name:{width}}  {recipe.format_of(module) or NOT_SELECTED}")


def _rules(recipe: Recipe, module: str) -> list[str]:
    deciding = recipe.deciding(module)
    lines = []
    for number, rule in enumerate(recipe.rules, 1):
        effect = rule.format or NOT_SELECTED
        lines.append(f"  rule {number} ({rule}: {effect}): {_verdict(rule, deciding, module)}")
    lines.append(f"  {recipe.name}: {recipe.format_of(module) or NOT_SELECTED}")
    return lines


def _verdict(rule: RecipeRule, deciding: RecipeRule | None, module: str) -> str:
    if not rule.matches(module):
        return "no match"
    return "decides" if rule is deciding else "overridden by a later rule"


def _require_module(module: str, source: str) -> None:
    """Refuse a module that the checkpoint does not have.

    Raises:
        PlanError: with the nearest names.
    """
    from exporter.layout import unstacked  # noqa: PLC0415  (as above)
    from verifier.checkpoint import open_checkpoint  # noqa: PLC0415
    from verifier.schemes import collapse, gather  # noqa: PLC0415

    present = gather(unstacked(open_checkpoint(source)).tensors.values())
    if module not in present:
        names = {collapse(n) for n in present}
        nearest = difflib.get_close_matches(collapse(module), names, n=3, cutoff=0.0)
        raise PlanError(
            f"{source} has no module {module}; the nearest names are {', '.join(nearest)}"
        )
