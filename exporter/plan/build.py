# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of an export. Pure: headers in, a plan out, no tensor is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from exporter.plan.model import Action, Constant, Copy, Encode, Origin, Plan
from exporter.recipes import Recipe
from verifier.checkpoint import Checkpoint, Tensor
from verifier.errors import PlanError, UsageError
from verifier.schemes import (
    FLOATS,
    FORMATS,
    Format,
    Module,
    collapse,
    expert_key,
    fused_groups,
    gather,
    layer_of,
    role,
)

InputScale = Literal["one", "stats"]
_STACKED = re.compile(
    r"\.experts\.[^.]+(\.weight)?$"
    r"|(^|\.)((\w+_)?moe|experts)\.([^.]+\.)*weight$"  # granitemoe: block_sparse_moe.input_linear.weight
)


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers that ``3-59`` or ``3,5,7-9`` names.

    Raises:
        UsageError: not such a list, or a range that runs backwards or is absurdly long.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"--layers {text}: {part.strip()!r} is no layer and no range like 3-59")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def require_sound(ckpt: Checkpoint, what: str) -> None:
    """Refuse a checkpoint whose container is broken: an export would copy the damage.

    Raises:
        PlanError: naming the first problem.
    """
    problems = [p for s in ckpt.shards for p in s.problems if p.kind not in ("trailing", "metadata")]
    if ckpt.index is not None:
        problems += ckpt.index.problems
        for name, file in ckpt.index.weight_map.items():
            shard = next((s for s in ckpt.shards if s.file == file), None)
            if shard is None:
                raise PlanError(f"{what} {ckpt.uri}: the index names {file}, which is not in the folder")
            if name not in shard.tensors and not shard.problems:
                raise PlanError(f"{what} {ckpt.uri}: the index says {name} is in {file}, and it is not")
    if problems:
        first = problems[0]
        place = f"{first.file}: {first.tensor}" if first.tensor else first.file
        raise PlanError(f"{what} {ckpt.uri}: {place}: {first.message}")
    if ckpt.duplicates:
        name, files = next(iter(ckpt.duplicates.items()))
        raise PlanError(f"{what} {ckpt.uri}: {name} stands in {' and '.join(files)}; remove the stray files")
    for name in (*ckpt.tensors, *(s.file for s in ckpt.shards)):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise PlanError(f"{what} {ckpt.uri}: the name {name} is no text: it holds a lone surrogate")
    if not isinstance(ckpt.config, Mapping):
        raise PlanError(f"{what} {ckpt.uri}: config.json is missing or no JSON object")


def refuse_stacked(ckpt: Checkpoint) -> None:
    """Refuse experts stored as one 3-D tensor.

    Raises:
        PlanError: naming the first such tensor.
    """
    for tensor in ckpt.tensors.values():
        if len(tensor.shape) >= 3 and _STACKED.search(tensor.name):
            raise PlanError(
                f"{tensor.name} holds all experts of its layer in one tensor of shape {list(tensor.shape)}; stacked hub "
                f"layouts are not supported (model_type {ckpt.model_type!r})"
            )


def build(
    source: Checkpoint,
    recipe: Recipe,
    *,
    onto: Checkpoint | None = None,
    layers: frozenset[int] | None = None,
    input_scale: InputScale | None = None,
    stats: Mapping[str, float] | None = None,
) -> Plan:
    """Return the plan of an export.

    Args:
        source: the unquantized checkpoint.
        recipe: which modules get which format.
        onto: the checkpoint whose bytes everything else keeps.
        layers: quantize in these layers only; each must hold routed experts.
        input_scale: ``one`` writes 1.0; ``stats`` writes what ``stats`` gives.
        stats: input amax by hub module name.

    Raises:
        PlanError: nothing selected, a layer without experts, unequal expert sets, a shape or width that does not fit.
        UsageError: a W4A4 recipe without a source of input scales.
    """
    for ckpt, what in ((source, "source"), (onto, "onto")):
        if ckpt is not None:
            require_sound(ckpt, what)
            refuse_stacked(ckpt)
    modules = gather(source.tensors.values())
    wanted = _select(modules, recipe, layers)
    targets = gather(onto.tensors.values()) if onto is not None else modules
    if onto is not None:
        _same_experts(modules, targets, onto)
    _check_targets(modules, wanted, targets, onto)
    groups = _groups(wanted, {**modules, **targets})
    if input_scale is None and any(_has_input(FORMATS[f]) for f in wanted.values()):
        raise UsageError(
            f"recipe {recipe.name} quantizes activations: give --input-scale one, or --stats FILE with their maxima"
        )
    scale_leaf = _mxfp8_leaf(targets)
    units = _units(modules, wanted, groups, scale_leaf, input_scale, stats, recipe.calibration)
    kept: Origin = "onto" if onto is not None else "source"
    actions: list[Action] = []
    left: list[tuple[Origin, str, str]] = []
    done: set[int] = set()
    for name, module in targets.items():
        unit = units.get(name)
        if unit is None:
            actions += [Copy(t, kept) for t in module.parts.values()]
            continue
        if id(unit) not in done:
            done.add(id(unit))
            actions.append(unit)
        for leaf, tensor in module.parts.items():
            if leaf == "bias":
                actions.append(Copy(tensor, kept))
            elif leaf != "weight" or onto is not None:
                left.append((kept, tensor.name, "replaced"))
    if onto is not None:
        taken = {w.name for u in units.values() for w in u.weights}
        left += [("source", n, "kept from onto") for n in source.tensors if n not in taken]
    options: dict[str, object] = {
        "recipe": recipe.name, "layers": sorted(layers) if layers is not None else None, "input_scale": input_scale,
        "calibration": recipe.calibration, "mxfp8_scale": scale_leaf,
    }  # fmt: skip
    plan = Plan("export", recipe.name, source, onto, tuple(actions), tuple(left), options)
    _one_fate(plan)
    return plan


def _select(modules: Mapping[str, Module], recipe: Recipe, layers: frozenset[int] | None) -> dict[str, str]:
    """Return format by module for the linears that the recipe selects."""
    linears = {n: m for n, m in modules.items() if m.dims is not None and "weight" in m.parts}
    chosen: dict[str, str] = {n: f for n in linears if (f := recipe.format_of(n)) is not None}
    if not chosen:
        kinds = sorted({collapse(n) for n in linears if role(n) not in ("norm", "embedding", "lm_head")})
        text = " ".join(str(r) for r in recipe.rules)
        near = difflib.get_close_matches(text, kinds, n=3, cutoff=0.0) or kinds[:3]
        raise PlanError(f"recipe {recipe.name}: nothing matches {text}; the nearest names here are {', '.join(near)}")
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
            raise PlanError(f"recipe {recipe.name} selects nothing in the layers that --layers names ({text})")
    return chosen


def _same_experts(modules: Mapping[str, Module], targets: Mapping[str, Module], onto: Checkpoint) -> None:
    ours = {n for n in modules if expert_key(n)}
    theirs = {n for n in targets if expert_key(n)}
    if ours != theirs:
        odd = sorted(ours ^ theirs)
        side = "the source" if odd[0] in ours else "onto"
        raise PlanError(
            f"the expert sets differ: {len(ours):,} in the source, {len(theirs):,} in {onto.uri}; "
            f"{odd[0]} is in {side} only ({len(odd):,} such)"
        )


def _check_targets(
    modules: Mapping[str, Module], wanted: Mapping[str, str], targets: Mapping[str, Module], onto: Checkpoint | None
) -> None:
    for name, fmt in wanted.items():
        weight, dims = modules[name].weight, modules[name].dims
        if weight is None or dims is None:
            raise PlanError(f"{name} has no two-dimensional weight")
        if modules[name].quantized or weight.dtype not in FLOATS:
            raise PlanError(f"{weight.name} is {weight.dtype} in the source; a floating weight is needed to quantize it")
        size = FORMATS[fmt].group_size or 1
        if dims[1] % size:
            raise PlanError(f"{weight.name}: the input dimension {dims[1]} is not a multiple of {fmt}'s block {size}")
        if onto is not None:
            target = targets.get(name)
            if target is None or target.dims is None:
                raise PlanError(f"{name} is in the source and not in {onto.uri}")
            if target.dims != dims:
                raise PlanError(f"{name}: [{dims[0]}, {dims[1]}] in the source, {list(target.dims)} in {onto.uri}")


def _has_input(fmt: Format) -> bool:
    return any("input_scale" in s.leaves and s.required for s in fmt.siblings)


def _mxfp8_leaf(targets: Mapping[str, Module]) -> str:
    """Return how ``onto`` names MXFP8 scales, else ``weight_scale``."""
    for module in targets.values():
        if module.shown is FORMATS["mxfp8"]:
            return "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    return "weight_scale"


def _groups(wanted: Mapping[str, str], present: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the fused group of each selected module that has one; a group is selected whole, in one format.

    Raises:
        PlanError: a group with two formats, or of which a part is not selected.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for _, members in fused_groups(present):
        formats = {wanted.get(m) for m in members}
        if len(formats) > 1:
            odd = ", ".join(f"{m} {wanted.get(m, 'not selected')}" for m in members)
            raise PlanError(f"engines fuse these and need one format for all: {odd}")
        if None not in formats:
            groups |= dict.fromkeys(members, members)
    return groups


def _units(
    modules: Mapping[str, Module],
    wanted: Mapping[str, str],
    groups: Mapping[str, tuple[str, ...]],
    mxfp8_leaf: str,
    input_scale: InputScale | None,
    stats: Mapping[str, float] | None,
    method: str,
) -> dict[str, Encode]:
    """Return the quantization of each selected module; members of a fused group share one."""
    found: dict[str, Encode] = {}
    for name, fmt_name in wanted.items():
        if name in found:
            continue
        fmt = FORMATS[fmt_name]
        members = groups.get(name, (name,)) if fmt.packed else (name,)
        weights = tuple(_weight(modules[m]) for m in members)
        scales = None
        if _has_input(fmt):
            value = _input_scale(members, input_scale, stats)
            scales = tuple(value for _ in members)
        leaf = "weight_scale" if fmt.packed else mxfp8_leaf
        found |= dict.fromkeys(members, Encode(members, weights, fmt, leaf, scales, method if fmt.packed else "max"))
    return found


def _weight(module: Module) -> Tensor:
    return module.parts["weight"]


def _input_scale(members: Iterable[str], how: InputScale | None, stats: Mapping[str, float] | None) -> float:
    if how == "one":
        return 1.0
    given = stats or {}
    missing = [m for m in members if m not in given]
    if missing:
        raise PlanError(f"the stats have no input maximum for {missing[0]}; were they taken from this model?")
    return max(given[m] for m in members) / 2688.0


def merge(
    experts: Checkpoint, onto: Checkpoint, *, input_scale: Literal["keep", "one"] = "keep"
) -> Plan:
    """Return the plan that moves another tool's quantized experts onto a checkpoint, byte for byte.

    Args:
        experts: where the quantized routed experts come from.
        onto: what everything else is kept from.
        input_scale: ``keep`` copies the experts' activation scales; ``one`` writes 1.0.

    Raises:
        PlanError: no quantized experts, unequal expert sets or shapes, a W4A4 expert without an input scale to keep.
    """
    for ckpt, what in ((experts, "experts"), (onto, "onto")):
        require_sound(ckpt, what)
        refuse_stacked(ckpt)
    ours, theirs = gather(experts.tensors.values()), gather(onto.tensors.values())
    _same_experts(ours, theirs, onto)
    moved = {n: m for n, m in ours.items() if expert_key(n) and m.quantized}
    if not moved:
        raise PlanError(f"{experts.uri} holds no quantized routed expert")
    actions: list[Action] = []
    left: list[tuple[Origin, str, str]] = []
    for name, module in theirs.items():
        new = moved.get(name)
        if new is None:
            actions += [Copy(t, "onto") for t in module.parts.values()]
            continue
        if new.dims != module.dims:
            raise PlanError(f"{name}: {new.dims} in {experts.uri}, {module.dims} in {onto.uri}")
        left += [("onto", t.name, "replaced") for t in module.parts.values()]
        for leaf, tensor in new.parts.items():
            if leaf == "input_scale" and input_scale == "one":
                left.append(("source", tensor.name, "replaced"))
            else:
                actions.append(Copy(tensor, "source"))
        if new.weight is not None and new.weight.dtype == "U8" and input_scale == "one":
            actions.append(Constant(f"{name}.input_scale", 1.0))
    left += [("source", t.name, "kept from onto") for n, m in ours.items() if n not in moved for t in m.parts.values()]
    packed = [n for n, m in moved.items() if m.weight is not None and m.weight.dtype == "U8"]
    without = [n for n in packed if "input_scale" not in moved[n].parts]
    if input_scale == "keep" and without and len(without) != len(packed):
        count = f"{len(without):,} of {len(packed):,}"
        raise PlanError(f"{without[0]} has no input_scale to keep ({count}); --input-scale one writes 1.0")
    plan = Plan("merge", "merge", experts, onto, tuple(actions), tuple(left), {"input_scale": input_scale})
    _one_fate(plan)
    return plan


def _one_fate(plan: Plan) -> None:
    """Hold the set equation: no name is written twice, and every tensor of both checkpoints is used or left.

    Raises:
        PlanError: the equation does not hold, which is a defect of the plan.
    """
    names = [s.name for s in plan.specs]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})[0]
        raise PlanError(f"{twice} would be written twice")
    used: set[tuple[str, str]] = {(o, n) for o, n, _ in plan.left}
    for action in plan.actions:
        if isinstance(action, Copy):
            used.add((action.origin, action.tensor.name))
        elif isinstance(action, Encode):
            used |= {("source", w.name) for w in action.weights}
    owed = {("source", n) for n in plan.source.tensors}
    if plan.onto is not None:
        owed |= {("onto", n) for n in plan.onto.tensors}
    if used != owed:
        odd = sorted(used ^ owed)[0]
        raise PlanError(f"{odd[1]} of {odd[0]} has no fate in the plan")
