# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of an export. Pure: headers in, a plan out, no tensor is
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.layout import ExpertLayout, Unstacked
from exporter.plan.model import Action, Constant, Copy, Decode, Encode, Origin, Plan, Stats
from exporter.plan.restack import restack, touched
from exporter.plan.select import groups, select
from exporter.plan.sound import one_fate, refuse_stacked, require_sound, same_experts
from exporter.plan.sources import Reader, Rest, rest_of
from exporter.recipes import KvName, Recipe
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError, UsageError
from verifier.schemes import FORMATS, KV_LEAVES, Format, Module, gather, role

InputScale = Literal["one", "stats"]
RANGES = {"nvfp4": 2688.0, "fp8": 448.0}
"""What an input maximum is divided by to give ``input_scale``, for the formats that have one."""
KV_RANGE = 448.0
_RAGGED = frozenset({"fp8", "fp8_per_channel", "fp8_block"})
"""Formats whose last block may be short."""


@dataclass(frozen=True)
class _Scales:
    """Where activation and KV scales come from."""

    how: InputScale | None
    stats: Stats

    def of(self, members: Iterable[str], fmt: Format) -> float:
        """Return the ``input_scale`` that the members of a fused group share."""
        if self.how == "one":
            return 1.0
        missing = [m for m in members if m not in self.stats.inputs]
        if missing:
            raise PlanError(
                f"the stats have no input maximum for {missing[0]}; were they taken from this model?"
            )
        return max(self.stats.inputs[m] for m in members) / RANGES[fmt.name]


def build(
    source: Checkpoint,
    recipe: Recipe,
    *,
    onto: Checkpoint | None = None,
    layers: frozenset[int] | None = None,
    input_scale: InputScale | None = None,
    stats: Stats | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
) -> Plan:
    """Return the plan of an export.

    Args:
        source: the checkpoint whose weights are quantized; quantized ones are decoded first.
        recipe: which modules get which format.
        onto: the checkpoint whose bytes everything else keeps.
        layers: quantize in these layers only; each must hold routed experts.
        input_scale: ``one`` writes 1.0; ``stats`` writes what ``stats`` gives.
        stats: input and KV maxima.
        rest: what becomes of quantized modules that the recipe leaves
            (`exporter.plan.sources.rest_of`).
        kv_cache: instead of the recipe's.
        expert_layout: how experts that the source holds in stacks are written; the family's default
            where None.

    Raises:
        PlanError: nothing selected, a layer without experts, unequal expert sets, a shape or width
            that does not fit, a stack of which only a part is quantized.
        UsageError: static activations without a source of input scales; KV scales without stats.
    """
    for ckpt, what in ((source, "source"), (onto, "onto")):
        if ckpt is not None:
            require_sound(ckpt, what)
            refuse_stacked(ckpt)
    modules = gather(source.tensors.values())
    reader = Reader(source, modules)
    wanted = select(modules, recipe, layers)
    targets = gather(onto.tensors.values()) if onto is not None else modules
    if onto is not None:
        same_experts(modules, targets, onto)
    _check_targets(modules, wanted, targets, onto)
    fused = groups(wanted, {**modules, **targets})
    if onto is None:
        wanted = _without_done(wanted, fused, reader, recipe)
    if input_scale is None and any(f in RANGES for f in wanted.values()):
        raise UsageError(
            f"recipe {recipe.name} quantizes activations: give --input-scale one, or --stats FILE with their maxima"
        )
    scale_leaf = _mxfp8_leaf(targets)
    units = _units(
        reader,
        wanted,
        fused,
        scale_leaf,
        _Scales(input_scale, stats or Stats({})),
        recipe.calibration,
    )
    kept: Origin = "onto" if onto is not None else "source"
    left_as_is = Reader(onto, targets) if onto is not None else reader
    still = {n: f for n in targets if n not in units and (f := left_as_is.format(n)) is not None}
    decoded = rest_of(still, frozenset(wanted.values()), rest)
    kv = kv_cache or recipe.kv_cache
    kv_actions = _kv(targets, kv, stats)
    replaced = {a.name for a in kv_actions}
    actions: list[Action] = []
    left: list[tuple[Origin, str, str]] = []
    done: set[int] = set()
    for name, module in targets.items():
        unit: Encode | Decode | None = units.get(name)
        if unit is None and name in decoded:
            unit = Decode(left_as_is.plain_name(name), left_as_is.weight(name), kept)
        if unit is not None and id(unit) not in done:
            done.add(id(unit))
            actions.append(unit)
        used = _used(unit, kept)
        for leaf, tensor in module.parts.items():
            if tensor.name in replaced:
                left.append((kept, tensor.name, "replaced"))
            elif unit is None or leaf == "bias" or leaf in KV_LEAVES:
                actions.append(Copy(tensor, kept))
            elif tensor.name not in used:
                left.append((kept, tensor.name, "replaced"))
    actions += kv_actions
    if onto is not None:
        taken = {t.name for u in units.values() for w in u.weights for t in w.parts.values()}
        left += [("source", n, "kept from onto") for n in source.tensors if n not in taken]
    layout = _layout(source, onto, expert_layout)
    written: Checkpoint = source
    if isinstance(source, Unstacked) and kept == "source":
        anew = touched(source.stacks, [*units, *decoded])
        if layout == "hub" or not anew:
            actions, left = restack(source, actions, left, units, decoded)
            written, layout = source.raw, "hub"
    options: dict[str, object] = {
        "recipe": recipe.name,
        "layers": sorted(layers) if layers is not None else None,
        "input_scale": input_scale,
        "calibration": recipe.calibration,
        "mxfp8_scale": scale_leaf,
        "kv_cache": kv,
        "rest": rest,
    }
    if layout is not None:
        options["expert_layout"] = layout
    plan = Plan("export", recipe.name, written, onto, tuple(actions), tuple(left), options)
    one_fate(plan)
    return plan


def _layout(
    source: Checkpoint, onto: Checkpoint | None, asked: ExpertLayout | None
) -> ExpertLayout | None:
    """Return how the experts of the source's stacks are written, None where it has none.

    Raises:
        UsageError: stacks are asked for, and there are none, or another checkpoint is kept.
    """
    if not isinstance(source, Unstacked):
        if asked == "hub":
            raise UsageError(
                f"--expert-layout hub: {source.uri} holds no experts in stacks; they are written one by one"
            )
        return None
    found = asked or source.stacks.family.default
    if onto is not None and found == "hub":
        raise UsageError(
            f"--onto: the stacks of {source.stacks.family.name} are not put into another checkpoint's; "
            "--expert-layout per-expert writes experts one by one"
        )
    return found


def _used(unit: Encode | Decode | None, kept: Origin) -> set[str]:
    """Return the tensors of the kept checkpoint that an action reads."""
    if isinstance(unit, Decode):
        return {t.name for t in unit.weight.parts.values()}
    if unit is None or kept == "onto":
        return set()
    return {t.name for w in unit.weights for t in w.parts.values()}


def _check_targets(
    modules: Mapping[str, Module],
    wanted: Mapping[str, str],
    targets: Mapping[str, Module],
    onto: Checkpoint | None,
) -> None:
    for name, fmt in wanted.items():
        weight, dims = modules[name].weight, modules[name].dims
        if weight is None or dims is None:
            raise PlanError(f"{name} has no two-dimensional weight")
        size = 1 if fmt in _RAGGED else FORMATS[fmt].group_size or 1
        if dims[1] % size:
            raise PlanError(
                f"{weight.name}: the input dimension {dims[1]} is not a multiple of {fmt}'s block {size}"
            )
        if onto is not None:
            target = targets.get(name)
            if target is None or target.dims is None:
                raise PlanError(f"{name} is in the source and not in {onto.uri}")
            if target.dims != dims:
                raise PlanError(
                    f"{name}: [{dims[0]}, {dims[1]}] in the source, {list(target.dims)} in {onto.uri}"
                )


def _without_done(
    wanted: Mapping[str, str], fused: Mapping[str, tuple[str, ...]], reader: Reader, recipe: Recipe
) -> dict[str, str]:
    """Return ``wanted`` without what is stored in its format already: those bytes are kept.

    Raises:
        PlanError: nothing remains.
    """
    done = {
        n for n, f in wanted.items() if (found := reader.format(n)) is not None and found.name == f
    }
    left = {n: f for n, f in wanted.items() if not all(m in done for m in fused.get(n, (n,)))}
    if not left:
        formats = ", ".join(sorted(set(wanted.values())))
        raise PlanError(
            f"recipe {recipe.name}: all {len(wanted):,} modules that it selects are {formats} already"
        )
    return left


def _mxfp8_leaf(targets: Mapping[str, Module]) -> str:
    """Return how ``onto`` names MXFP8 scales, else ``weight_scale``."""
    for module in targets.values():
        if module.inferred_format is FORMATS["mxfp8"]:
            return "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    return "weight_scale"


def _units(
    reader: Reader,
    wanted: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
    mxfp8_leaf: str,
    scales: _Scales,
    method: str,
) -> dict[str, Encode]:
    """Return the quantization of each selected module; members of a fused group share one where
    they share a scale.
    """
    found: dict[str, Encode] = {}
    for name, fmt_name in wanted.items():
        if name in found:
            continue
        fmt = FORMATS[fmt_name]
        shares = fmt.packed or fmt_name in RANGES
        members = fused.get(name, (name,)) if shares else (name,)
        weights = tuple(reader.weight(m) for m in members)
        inputs = None
        if fmt_name in RANGES:
            inputs = (scales.of(members, fmt),) * len(members)
        leaf = mxfp8_leaf if fmt_name == "mxfp8" else fmt.siblings[0].leaves[0]
        how = method if fmt.packed else "max"
        if fmt.packed and all(w.format is FORMATS["mxfp4"] for w in weights):
            how = "exact"
        found |= dict.fromkeys(members, Encode(members, weights, fmt, leaf, inputs, how))
    return found


def _kv(targets: Mapping[str, Module], kv: KvName | None, stats: Stats | None) -> list[Constant]:
    """Return the KV scales, ``k_proj.k_scale`` and ``v_proj.v_scale`` of each attention layer: amax
    / 448.

    Raises:
        UsageError: scales are wanted and there are no stats.
        PlanError: the checkpoint has no k_proj and v_proj, or the stats lack one.
    """
    if kv != "fp8":
        return []
    if stats is None:
        raise UsageError(
            "FP8 KV scales come from calibration: give --stats FILE, or --kv fp8_cast for none"
        )
    wanted = [
        n
        for n in targets
        if n.rpartition(".")[2] in ("k_proj", "v_proj") and role(n) == "attention"
    ]
    if not wanted:
        raise PlanError("KV scales: no attention module here has a k_proj and a v_proj")
    found = []
    for name in wanted:
        kind = name.rpartition(".")[2][0]
        amax = stats.kv.get(f"{name}.{kind}_amax")
        if amax is None:
            raise PlanError(
                f"the stats have no {kind}_amax for {name}; were they taken from this model?"
            )
        found.append(Constant(f"{name}.{kind}_scale", amax / KV_RANGE))
    return found
