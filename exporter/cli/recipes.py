# SPDX-License-Identifier: Apache-2.0
"""``ckptgate recipes``: list, show, explain."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.errors import PlanError

if TYPE_CHECKING:
    from exporter.recipes import Recipe


@click.group()
def recipes() -> None:
    """List the recipes, show one, or explain what they do to a module."""


@recipes.command("list")
def list_() -> None:
    """List the recipes of the package."""
    from exporter.recipes import load, names  # noqa: PLC0415  (numpy, and the root help lists this command)

    found = [load(n) for n in names()]
    width = max(len(r.name) for r in found)
    for recipe in found:
        click.echo(f"{recipe.name:{width}}  {recipe.description}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe, checked: a name, or a YAML file."""
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
    "chosen",
    help="One recipe (a name or a YAML file) rule by rule, instead of all in a line each.",
)
@click.option(
    "--source", metavar="DIR", help="The checkpoint that MODULE is in; its name is then checked."
)
def explain(module: str, chosen: str | None, source: str | None) -> None:
    """Print what recipes do to MODULE, a full hub name, and which rule decides."""
    from exporter.recipes import PROTECTED, load, names  # noqa: PLC0415  (as above)
    from verifier.schemes import role  # noqa: PLC0415

    if source is not None:
        _require(module, source)
    what = role(module)
    guarded = "; no wildcard reaches it" if what in PROTECTED else ""
    click.echo(f"{module}: role {what}{guarded}")
    if chosen is not None:
        click.echo("\n".join(_rules(load(chosen), module)))
        return
    found = [load(n) for n in names()]
    width = max(len(r.name) for r in found)
    for recipe in found:
        click.echo(f"  {recipe.name:{width}}  {recipe.format_of(module) or 'left as it is'}")


def _rules(recipe: Recipe, module: str) -> list[str]:
    deciding = recipe.deciding(module)
    lines = []
    for number, rule in enumerate(recipe.rules, 1):
        said = rule.format or "left as it is"
        verdict = (
            "no match"
            if not rule.matches(module)
            else "decides"
            if rule is deciding
            else "overruled by a later rule"
        )
        lines.append(f"  rule {number} ({rule}: {said}): {verdict}")
    lines.append(f"  {recipe.name}: {recipe.format_of(module) or 'left as it is'}")
    return lines


def _require(module: str, source: str) -> None:
    """Refuse a module that the checkpoint does not have.

    Raises:
        PlanError: with the nearest names.
    """
    from exporter.layout import unstacked  # noqa: PLC0415  (as above)
    from verifier.checkpoint import open_checkpoint  # noqa: PLC0415
    from verifier.schemes import collapse, gather  # noqa: PLC0415

    present = gather(unstacked(open_checkpoint(source)).tensors.values())
    if module not in present:
        near = difflib.get_close_matches(
            collapse(module), {collapse(n) for n in present}, n=3, cutoff=0.0
        )
        raise PlanError(f"{source} has no module {module}; the nearest names are {', '.join(near)}")
