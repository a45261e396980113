# SPDX-License-Identifier: Apache-2.0
"""Which modules a recipe selects, in which layers, and which of them engines fuse."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from exporter.recipes import Recipe
from verifier.errors import PlanError, UsageError
from verifier.layouts.engine_needs import unread_formats
from verifier.schemes import (
    ENGINE_NAMES,
    ENGINE_VERSIONS,
    FORMATS,
    PACKED,
    WHOLE_TILES,
    Engine,
    Fusion,
    Module,
    collapse,
    engine_groups,
    expert_key,
    fused_groups,
    layer_of,
    role,
    split_tiles,
)


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers that ``3-59`` or ``3,5,7-9`` names.

    Raises:
        UsageError: not such a list, a range that runs backwards, or a number of more than 6 digits.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(
                f'--layers {text}: "{part.strip()}" is not a layer or a range like 3-59'
            )
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


def select(
    modules: Mapping[str, Module], recipe: Recipe, layers: frozenset[int] | None
) -> dict[str, str]:
    """Return format by module for the linear layers that the recipe selects.

    Raises:
        PlanError: a rule that matches nothing, or only part of what it names; a layer without
            experts; nothing left.
    """
    linears = {n: m for n, m in modules.items() if m.dims is not None and _has_weight(m)}
    formats = {name: recipe.format_of(name) for name in linears}
    selected: dict[str, str] = {name: fmt for name, fmt in formats.items() if fmt is not None}
    _require_matches(modules, linears, recipe)
    if not selected:
        raise PlanError(f"recipe {recipe.name}: its rules select no module")
    if layers is None:
        return selected
    _require_experts(linears, layers)
    selected = {n: f for n, f in selected.items() if layer_of(n) in layers}
    if not selected:
        text = ", ".join(map(str, sorted(layers)))
        raise PlanError(f"recipe {recipe.name} selects nothing in the layers of --layers ({text})")
    return selected


def _has_weight(module: Module) -> bool:
    return any(leaf in module.parts for leaf in ("weight", "weight_packed", "blocks"))


def _require_experts(linears: Iterable[str], layers: frozenset[int]) -> None:
    """Check that each layer holds routed experts.

    Raises:
        PlanError: naming the layers without.
    """
    numbers = (layer_of(n) for n in linears if expert_key(n))
    sparse = {n for n in numbers if n is not None}
    without = sorted(layers - sparse)
    if without:
        raise PlanError(
            f"--layers: {', '.join(map(str, without))} hold no routed experts (layers that do: "
            f"{', '.join(map(str, sorted(sparse))) or 'none'})"
        )


def _require_matches(
    modules: Mapping[str, Module], linears: Mapping[str, Module], recipe: Recipe
) -> None:
    """Check each rule against the model: every pattern matches a linear layer, every role is
    present (with `match: any`, one of them).

    Raises:
        PlanError: naming the pattern or role.
    """
    roles = {role(n) for n in linears}
    for rule in recipe.rules:
        candidates = linears if rule.format else modules
        for pattern in rule.modules:
            if not any(rule.reaches(n, pattern) for n in candidates):
                text = _no_match(pattern, rule.roles, linears)
                raise PlanError(f"recipe {recipe.name}: {text}")
        absent = [] if rule.modules else [r for r in rule.roles if r not in roles]
        if not absent:
            continue
        all_absent = len(absent) == len(rule.roles)
        if all_absent or rule.match == "all":
            hint = (
                "" if all_absent else "; `match: any` in that rule requires only one of its roles"
            )
            text = _no_match(", ".join(absent), (), linears)
            raise PlanError(f"recipe {recipe.name}: {text}{hint}")
    for name, module in modules.items():
        if name in linears or module.weight is None or len(module.weight.shape) < 2:
            continue
        deciding = recipe.deciding(name)
        if deciding is not None and deciding.modules and deciding.format is not None:
            raise PlanError(
                f"recipe {recipe.name}: {deciding} also matches {name}, which is not a linear "
                f"layer ({list(module.weight.shape)}); narrow the pattern, or exclude it by a "
                "later rule with `format: null`"
            )


def _no_match(pattern: str, roles: Iterable[str], linears: Iterable[str]) -> str:
    """Return the sentence for a rule that matches nothing, with the nearest names."""
    kinds = sorted(
        {collapse(n) for n in linears if role(n) not in ("norm", "embedding", "lm_head")}
    )
    nearest = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.0) or kinds[:3]
    among = f" among {', '.join(roles)}" if roles else ""
    return f"nothing matches {pattern}{among}; the nearest names are {', '.join(nearest)}"


@dataclass(frozen=True)
class RecipeSelection:
    """What an export quantizes.

    Attributes:
        formats: the format of each module, by name.
        groups: the fused group of each module that has one.
        notes: what was changed so that engines can load the result.
    """

    formats: dict[str, str]
    groups: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()


def fit_groups(
    selected: Mapping[str, str],
    present: Mapping[str, Module],
    recipe: Recipe,
    family: str | None,
    engines: Iterable[Engine],
) -> RecipeSelection:
    """Return a selection in which every fused group has one format, or is left alone.

    Projections that only one engine fuses follow the others of their group where no rule of the
    recipe names them. A group that this engine cannot hold in the format is not quantized.

    Args:
        selected: format by module, as the recipe says.
        present: every module of the checkpoint that is written.
        recipe: whose rules may name single projections.
        family: the ``model_type``.
        engines: the engines that the export is for.

    Raises:
        PlanError: a group with two formats, of which a part is not selected, or in which a tile of
            scales reaches from one projection into the next; a format that an engine does not load
            in this family.
    """
    fitted = dict(selected)
    notes: dict[str, None] = {}
    linears = [name for name, module in present.items() if module.dims is not None]
    for engine in engines:
        for fusion, members in engine_groups(linears, family, engine):
            note = _fit_group(fitted, fusion, members, recipe)
            if note:
                notes[f"{ENGINE_NAMES[engine]}: {note}"] = None
            _require_one_format(members, fitted)
    if not fitted:
        raise PlanError(f"recipe {recipe.name} quantizes nothing: {'; '.join(notes)}")
    for unread in unread_formats(fitted.values(), family, engines):
        raise PlanError(
            f"{ENGINE_NAMES[unread.engine]} {ENGINE_VERSIONS[unread.engine]} does not load "
            f"{FORMATS[unread.format].algo} of {family}: {unread.why} ({unread.source}); "
            "--for none writes it anyway"
        )
    _require_whole_tiles(fitted, present, family, engines)
    return RecipeSelection(fitted, _groups(fitted, present, family), tuple(notes))


def _require_whole_tiles(
    formats: Mapping[str, str],
    present: Mapping[str, Module],
    family: str | None,
    engines: Iterable[Engine],
) -> None:
    """Check that no tile of scales reaches from one projection of a fused group into the next.

    Raises:
        PlanError: naming the projection.
    """
    readers = [ENGINE_NAMES[engine] for engine in engines if engine in WHOLE_TILES]
    tiled: dict[int, dict[str, int]] = {}
    for name, fmt in formats.items():
        block, dims = FORMATS[fmt].block, present[name].dims
        if readers and block is not None and block[0] > 1 and dims is not None:
            tiled.setdefault(block[0], {})[name] = dims[0]
    for tile, rows in tiled.items():
        for name, fused in split_tiles(rows, tile, family):
            raise PlanError(
                f"{name} has {rows[name]} rows, not a multiple of {tile}: "
                f"{' and '.join(readers)} does not load such blocks, because the next projection "
                f"of {fused.rpartition('.')[2]} follows within a tile of scales; use a different "
                "format, or --for none to write them anyway"
            )


def _fit_group(
    formats: dict[str, str], fusion: Fusion, members: Iterable[str], recipe: Recipe
) -> str:
    """Give the projections that one engine alone fuses the format of their group, or leave the
    group unquantized; return what was done, '' for nothing.
    """
    usual = [m for m in members if m.rpartition(".")[2] in PACKED[fusion.parameter]]
    others = [m for m in members if m not in usual]
    chosen = {formats.get(m) for m in usual}
    name = next(iter(chosen))
    if len(chosen) != 1 or name is None:
        return ""
    leaves = ", ".join(m.rpartition(".")[2] for m in others)
    if not fusion.holds(FORMATS[name], members):
        for member in members:
            formats.pop(member, None)
        kept = ", ".join(m.rpartition(".")[2] for m in usual)
        return (
            f"{kept} next to {leaves} are not quantized: its {fusion.parameter} takes all of them "
            f"and has no place for the per-tensor scales of {leaves} in {FORMATS[name].algo}"
        )
    followers = [m for m in others if m not in formats and recipe.deciding(m) is None]
    formats |= dict.fromkeys(followers, name)
    return (
        f"{leaves} are quantized to {FORMATS[name].algo} as well: its {fusion.parameter} takes them"
        if followers
        else ""
    )


def _groups(
    selected: Mapping[str, str], present: Iterable[str], family: str | None
) -> dict[str, tuple[str, ...]]:
    """Return the fused group of each selected module that has one; a group is selected whole, in
    one format.

    Raises:
        PlanError: a group with two formats, or of which a part is not selected.
    """
    by_module: dict[str, tuple[str, ...]] = {}
    for _, members in fused_groups(present, family):
        _require_one_format(members, selected)
        if members[0] in selected:
            by_module |= dict.fromkeys(members, members)
    return by_module


def _require_one_format(members: Iterable[str], selected: Mapping[str, str]) -> None:
    if len({selected.get(m) for m in members}) > 1:
        text = ", ".join(f"{m} {selected.get(m, 'not selected')}" for m in members)
        raise PlanError(f"engines fuse these modules and need one format for all: {text}")
