# SPDX-License-Identifier: Apache-2.0
"""Which modules a recipe selects, in which layers, and which of them engines fuse."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from exporter.recipes import Recipe
from verifier.errors import PlanError, UsageError
from verifier.schemes import Module, collapse, expert_key, fused_groups, layer_of, role


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers that ``3-59`` or ``3,5,7-9`` names.

    Raises:
        UsageError: not such a list, or a range that runs backwards or is absurdly long.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(
                f"--layers {text}: {part.strip()!r} is no layer and no range like 3-59"
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def select(
    modules: Mapping[str, Module], recipe: Recipe, layers: frozenset[int] | None
) -> dict[str, str]:
    """Return format by module for the linears that the recipe selects.

    Raises:
        PlanError: a rule that matches nothing, or only part of what it names; a layer without
            experts; nothing left.
    """
    linears = {n: m for n, m in modules.items() if m.dims is not None and _has_weight(m)}
    chosen: dict[str, str] = {n: f for n in linears if (f := recipe.format_of(n)) is not None}
    _require_matches(modules, linears, recipe)
    if not chosen:
        raise PlanError(f"recipe {recipe.name}: its rules leave every module as it is")
    if layers is not None:
        holding = {layer_of(n) for n in linears if expert_key(n)}
        without = sorted(layers - {h for h in holding if h is not None})
        if without:
            have = ", ".join(map(str, sorted(h for h in holding if h is not None))) or "none"
            raise PlanError(
                f"--layers: {', '.join(map(str, without))} hold no routed experts (layers that do: {have})"
            )
        chosen = {n: f for n, f in chosen.items() if layer_of(n) in layers}
        if not chosen:
            text = ", ".join(map(str, sorted(layers)))
            raise PlanError(
                f"recipe {recipe.name} selects nothing in the layers that --layers names ({text})"
            )
    return chosen


def _has_weight(module: Module) -> bool:
    return any(leaf in module.parts for leaf in ("weight", "weight_packed", "blocks"))


def _require_matches(
    modules: Mapping[str, Module], linears: Mapping[str, Module], recipe: Recipe
) -> None:
    """Hold each rule to what it names: every pattern finds a linear, every role is here (one of
    them, `match: any`).
    """
    roles = {role(n) for n in linears}
    for rule in recipe.rules:
        for pattern in rule.modules:
            if not any(rule.reaches(n, pattern) for n in (linears if rule.format else modules)):
                raise PlanError(f"recipe {recipe.name}: {_nothing(pattern, rule.roles, linears)}")
        if rule.modules:
            continue
        absent = [r for r in rule.roles if r not in roles]
        if len(absent) == len(rule.roles) or (absent and rule.match == "all"):
            some = (
                ""
                if len(absent) == len(rule.roles)
                else "; `match: any` in that rule makes do with the others"
            )
            raise PlanError(
                f"recipe {recipe.name}: {_nothing(', '.join(absent), (), linears)}{some}"
            )
    for name, module in modules.items():
        if name in linears or module.weight is None or len(module.weight.shape) < 2:
            continue
        by = recipe.deciding(name)
        if by is not None and by.modules and by.format is not None:
            raise PlanError(
                f"recipe {recipe.name}: {by} names {name} too, which is no linear layer ({list(module.weight.shape)}); "
                "name less, or leave it by a later rule with `format: null`"
            )


def _nothing(wanted: str, roles: Iterable[str], linears: Iterable[str]) -> str:
    """Return the sentence for a rule that finds nothing, with what comes nearest."""
    kinds = sorted(
        {collapse(n) for n in linears if role(n) not in ("norm", "embedding", "lm_head")}
    )
    near = difflib.get_close_matches(wanted, kinds, n=3, cutoff=0.0) or kinds[:3]
    among = f" among {', '.join(roles)}" if roles else ""
    return f"nothing matches {wanted}{among}; the nearest names here are {', '.join(near)}"


def groups(wanted: Mapping[str, str], present: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the fused group of each selected module that has one; a group is selected whole, in
    one format.

    Raises:
        PlanError: a group with two formats, or of which a part is not selected.
    """
    found: dict[str, tuple[str, ...]] = {}
    for _, members in fused_groups(present):
        formats = {wanted.get(m) for m in members}
        if len(formats) > 1:
            odd = ", ".join(f"{m} {wanted.get(m, 'not selected')}" for m in members)
            raise PlanError(f"engines fuse these and need one format for all: {odd}")
        if None not in formats:
            found |= dict.fromkeys(members, members)
    return found
