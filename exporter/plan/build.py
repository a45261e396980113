# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of an export. Pure: headers in, a plan out; no tensor is
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.layout import EXPERT_LAYOUTS, ExpertLayout
from exporter.plan.model import (
    DEFAULT_ENGINES,
    Action,
    Constant,
    Copy,
    Decode,
    Encode,
    Origin,
    Plan,
    Skipped,
)
from exporter.plan.restack import any_expert, restack
from exporter.plan.select import fit_groups, select
from exporter.plan.sound import (
    refuse_stacked,
    require_every_tensor_once,
    require_same_experts,
    require_sound,
)
from exporter.plan.sources import Reader, Rest, decoded_rest
from exporter.plan.stats_file import ActivationStats
from exporter.recipes import KvName, Recipe
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError, UsageError
from verifier.layouts.engine_needs import unread_kv_scales
from verifier.layouts.expert_stacks import StackLayout, UnstackedCheckpoint
from verifier.schemes import (
    ENGINE_NAMES,
    ENGINE_VERSIONS,
    FORMATS,
    KV_LEAVES,
    Engine,
    Format,
    Module,
    gather,
    role,
)

InputScale = Literal["one", "stats"]
RANGES = {"nvfp4": 2688.0, "fp8": 448.0}
"""What an input maximum is divided by to give ``input_scale``, for the formats that have one."""
KV_RANGE = 448.0
_RAGGED = frozenset({"fp8", "fp8_per_channel", "fp8_block"})
"""Formats whose last block may be short."""


@dataclass(frozen=True)
class ExportChoices:
    """What an export writes, besides its recipe.

    Attributes:
        layers: quantize in these layers only; each must hold routed experts.
        input_scale: ``one`` writes 1.0; ``stats`` writes what ``stats`` gives.
        stats: input and KV maxima.
        rest: quantized modules that the recipe does not select: `exporter.plan.sources`.
        kv_cache: instead of the recipe's.
        expert_layout: how experts that the source holds in stacks are written; the family's default
            where None.
        engines: the engines that have to load the result.
    """

    layers: frozenset[int] | None = None
    input_scale: InputScale | None = None
    stats: ActivationStats | None = None
    rest: Rest | None = None
    kv_cache: KvName | None = None
    expert_layout: ExpertLayout | None = None
    engines: tuple[Engine, ...] = DEFAULT_ENGINES

    def shared_input_scale(self, members: Iterable[str], fmt: Format) -> float:
        """Return the ``input_scale`` that the members of a fused group share.

        Raises:
            PlanError: the stats lack a member.
        """
        if self.input_scale == "one":
            return 1.0
        inputs = self.stats.inputs if self.stats is not None else {}
        missing = [m for m in members if m not in inputs]
        if missing:
            raise PlanError(
                f"the stats have no input maximum for {missing[0]}; were they measured on this "
                "model?"
            )
        return max(inputs[m] for m in members) / RANGES[fmt.name]


def build(
    source: Checkpoint,
    recipe: Recipe,
    *,
    onto: Checkpoint | None = None,
    choices: ExportChoices = ExportChoices(),
) -> Plan:
    """Return the plan of an export.

    Args:
        source: the checkpoint whose weights are quantized; quantized ones are decoded first.
        recipe: which modules get which format.
        onto: the checkpoint whose bytes everything else keeps.
        choices: what else decides the output.

    Raises:
        PlanError: nothing selected, a layer without experts, unequal expert sets, a shape or width
            that does not fit, a stack of which only a part is quantized.
        UsageError: static activations without input scales; KV scales without stats.
    """
    for ckpt, owner in ((source, "source"), (onto, "onto")):
        if ckpt is not None:
            require_sound(ckpt, owner)
            refuse_stacked(ckpt)
    modules = gather(source.tensors.values())
    reader = Reader(source, modules)
    selected = select(modules, recipe, choices.layers)
    targets = gather(onto.tensors.values()) if onto is not None else modules
    if onto is not None:
        require_same_experts(modules, targets, onto)
    present = {**modules, **targets}
    fit = fit_groups(selected, present, recipe, source.model_type, choices.engines)
    selected, fused = fit.formats, fit.groups
    _check_targets(modules, selected, targets, onto)
    if onto is None:
        selected = _without_done(selected, fused, reader, recipe)
    if choices.input_scale is None and any(f in RANGES for f in selected.values()):
        raise UsageError(
            f"recipe {recipe.name} quantizes activations: pass --input-scale one, or --stats FILE "
            "with their maxima"
        )
    scale_leaf = _mxfp8_leaf(targets)
    units = _units(reader, selected, fused, _Encoding(choices, scale_leaf, recipe.calibration))
    kept_reader = Reader(onto, targets) if onto is not None else reader
    decoded = _decoded(kept_reader, targets, units, selected, choices.rest)
    kv = choices.kv_cache or recipe.kv_cache
    kv_scales = _kv_scales(targets, kv, choices.stats)
    actions, skipped = _actions(
        targets, units, decoded, kept_reader, kv_scales, "onto" if onto is not None else "source"
    )
    if onto is not None:
        used = {t.name for u in units.values() for w in u.weights for t in w.parts.values()}
        skipped += [("source", n, "kept from onto") for n in source.tensors if n not in used]
    layout = _layout(source, onto, choices, [*units, *decoded])
    written: Checkpoint = source
    if isinstance(source, UnstackedCheckpoint) and onto is None:
        if layout == "hub" or not any_expert(source.stacks, [*units, *decoded]):
            actions, skipped = restack(source, actions, skipped, units, decoded)
            written, layout = source.raw, "hub"
    options: dict[str, object] = {
        "recipe": recipe.name,
        "layers": sorted(choices.layers) if choices.layers is not None else None,
        "input_scale": choices.input_scale,
        "calibration": recipe.calibration,
        "mxfp8_scale": scale_leaf,
        "kv_cache": kv,
        "rest": choices.rest,
        "engines": {engine: ENGINE_VERSIONS[engine] for engine in choices.engines},
    }
    if layout is not None:
        options["expert_layout"] = layout
    plan = Plan(
        "export",
        recipe.name,
        written,
        onto,
        tuple(actions),
        tuple(skipped),
        options,
        (*fit.notes, *_kv_notes(kv_scales, source.model_type, choices.engines)),
        choices.engines,
    )
    require_every_tensor_once(plan)
    return plan


def _decoded(
    reader: Reader,
    targets: Mapping[str, Module],
    units: Mapping[str, Encode],
    selected: Mapping[str, str],
    rest: Rest | None,
) -> dict[str, Format]:
    """Return the quantized modules that are written as BF16, with the format they are read in."""
    formats = {name: reader.format(name) for name in targets if name not in units}
    unselected = {name: fmt for name, fmt in formats.items() if fmt is not None}
    return decoded_rest(unselected, frozenset(selected.values()), rest)


def _actions(
    targets: Mapping[str, Module],
    units: Mapping[str, Encode],
    decoded: Mapping[str, Format],
    reader: Reader,
    kv_scales: list[Constant],
    kept: Origin,
) -> tuple[list[Action], list[Skipped]]:
    """Return the actions of a plan in the order of the target's modules, and the tensors of the
    target that are not read.
    """
    replaced = {scale.name for scale in kv_scales}
    actions: list[Action] = []
    skipped: list[Skipped] = []
    done: set[int] = set()
    for name, module in targets.items():
        unit: Encode | Decode | None = units.get(name)
        if unit is None and name in decoded:
            unit = Decode(reader.plain_name(name), reader.weight(name), kept)
        if unit is not None and id(unit) not in done:
            done.add(id(unit))
            actions.append(unit)
        read = _tensors_read(unit, kept)
        for leaf, tensor in module.parts.items():
            if tensor.name in replaced:
                skipped.append((kept, tensor.name, "replaced"))
            elif unit is None or leaf == "bias" or leaf in KV_LEAVES:
                actions.append(Copy(tensor, kept))
            elif tensor.name not in read:
                skipped.append((kept, tensor.name, "replaced"))
    return [*actions, *kv_scales], skipped


def _tensors_read(unit: Encode | Decode | None, kept: Origin) -> set[str]:
    """Return the tensors of the kept checkpoint that an action reads."""
    if isinstance(unit, Decode):
        return {t.name for t in unit.weight.parts.values()}
    if unit is None or kept == "onto":
        return set()
    return {t.name for w in unit.weights for t in w.parts.values()}


def _layout(
    source: Checkpoint,
    onto: Checkpoint | None,
    choices: ExportChoices,
    changed: Iterable[str],
) -> ExpertLayout | None:
    """Return how the experts of the source's stacks are written, None where it has none.

    Args:
        source: the checkpoint that is read.
        onto: the checkpoint whose bytes everything else keeps.
        choices: the layout that is requested, and the engines that have to load it.
        changed: the modules that are quantized or decoded.

    Raises:
        UsageError: stacks are requested, and there are none, or another checkpoint is kept.
        PlanError: an engine loads quantized experts of the family in no layout, or not in this.
    """
    requested = choices.expert_layout
    if not isinstance(source, UnstackedCheckpoint):
        if requested == "hub":
            raise UsageError(
                f"--expert-layout hub: {source.uri} holds no stacks of experts; its experts are "
                "written individually"
            )
        return None
    family = source.stacks[0].layout
    layout = requested or family.default
    if any_expert(source.stacks, changed):
        layout = _loaded_layout(family, requested, choices.engines)
    if onto is not None and layout == "hub":
        raise UsageError(
            f"--onto: the stacks of {family.name} cannot be written into another checkpoint's; "
            "--expert-layout per-expert writes the experts individually"
        )
    return layout


def _loaded_layout(
    family: StackLayout, requested: ExpertLayout | None, engines: Iterable[Engine]
) -> ExpertLayout:
    """Return the layout of quantized experts that every engine loads: the one that is requested,
    the default, or another.

    Raises:
        PlanError: there is none.
    """
    possible = [requested] if requested else [family.default, *EXPERT_LAYOUTS]
    for engine in engines:
        forms = family.engines.get(engine)
        if forms is None:
            continue
        possible = [layout for layout in possible if layout in forms.layouts]
        if not possible:
            form = f" with --expert-layout {requested}" if requested and forms.layouts else ""
            others = [e for e, f in family.engines.items() if f.layouts and e != engine]
            ways = [f"--for {other}" for other in others] + ["--for none"]
            raise PlanError(
                f"{ENGINE_NAMES[engine]} {ENGINE_VERSIONS[engine]} does not load quantized experts "
                f"of {family.name}{form}: {forms.why} ({forms.source}); {' or '.join(ways)} writes "
                "them anyway"
            )
    return possible[0]


def _check_targets(
    modules: Mapping[str, Module],
    selected: Mapping[str, str],
    targets: Mapping[str, Module],
    onto: Checkpoint | None,
) -> None:
    """Check that each selected module can be quantized, and fits the checkpoint it is written into.

    Raises:
        PlanError: naming the module.
    """
    for name, fmt in selected.items():
        weight, dims = modules[name].weight, modules[name].dims
        if weight is None or dims is None:
            raise PlanError(f"{name} has no 2-D weight")
        size = 1 if fmt in _RAGGED else FORMATS[fmt].group_size or 1
        if dims[1] % size:
            raise PlanError(
                f"{weight.name}: the input dimension {dims[1]} is not a multiple of the block size "
                f"of {fmt}, {size}"
            )
        if onto is None:
            continue
        target = targets.get(name)
        if target is None or target.dims is None:
            raise PlanError(f"{name} is in the source and not in {onto.uri}")
        if target.dims != dims:
            raise PlanError(
                f"{name} is {list(dims)} in the source and {list(target.dims)} in {onto.uri}"
            )


def _without_done(
    selected: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
    reader: Reader,
    recipe: Recipe,
) -> dict[str, str]:
    """Return ``selected`` without what is stored in its format already: those bytes are kept.

    Raises:
        PlanError: nothing remains.
    """
    done = set()
    for name, fmt_name in selected.items():
        stored = reader.format(name)
        if stored is not None and stored.name == fmt_name:
            done.add(name)
    remaining = {
        name: fmt_name
        for name, fmt_name in selected.items()
        if not all(member in done for member in fused.get(name, (name,)))
    }
    if not remaining:
        formats = ", ".join(sorted(set(selected.values())))
        raise PlanError(
            f"recipe {recipe.name}: all {len(selected):,} modules that it selects are {formats} "
            "already"
        )
    return remaining


def _mxfp8_leaf(targets: Mapping[str, Module]) -> str:
    """Return the name of MXFP8 scales in ``onto``, else ``weight_scale``."""
    for module in targets.values():
        if module.inferred_format is FORMATS["mxfp8"]:
            return "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    return "weight_scale"


@dataclass(frozen=True)
class _Encoding:
    """How the selected modules are encoded."""

    choices: ExportChoices
    mxfp8_leaf: str
    method: str


def _units(
    reader: Reader,
    selected: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
    encoding: _Encoding,
) -> dict[str, Encode]:
    """Return the quantization of each selected module; members of a fused group are in one where
    they share a scale.
    """
    units: dict[str, Encode] = {}
    for name, fmt_name in selected.items():
        if name in units:
            continue
        fmt = FORMATS[fmt_name]
        shares = fmt.packed or fmt_name in RANGES
        members = fused.get(name, (name,)) if shares else (name,)
        weights = tuple(reader.weight(m) for m in members)
        inputs = None
        if fmt_name in RANGES:
            scale = encoding.choices.shared_input_scale(members, fmt)
            inputs = (scale,) * len(members)
        leaf = encoding.mxfp8_leaf if fmt_name == "mxfp8" else fmt.siblings[0].leaves[0]
        method = encoding.method if fmt.packed else "max"
        if fmt.packed and all(w.format is FORMATS["mxfp4"] for w in weights):
            method = "exact"
        unit = Encode(members, weights, fmt, leaf, inputs, method)
        units |= dict.fromkeys(members, unit)
    return units


def _kv_scales(
    targets: Mapping[str, Module], kv: KvName | None, stats: ActivationStats | None
) -> list[Constant]:
    """Return the KV scales, ``k_proj.k_scale`` and ``v_proj.v_scale`` of each attention layer: amax
    / 448.

    Raises:
        UsageError: scales are requested without stats.
        PlanError: the checkpoint has no k_proj and v_proj, or the stats lack one.
    """
    if kv != "fp8":
        return []
    if stats is None:
        raise UsageError(
            "FP8 KV scales come from calibration: pass --stats FILE, or --kv fp8_cast for a cache "
            "without scales"
        )
    projections = [
        n
        for n in targets
        if n.rpartition(".")[2] in ("k_proj", "v_proj") and role(n) == "attention"
    ]
    if not projections:
        raise PlanError(
            "KV scales: no attention module of the checkpoint has a k_proj and a v_proj"
        )
    scales = []
    for name in projections:
        kind = name.rpartition(".")[2][0]
        amax = stats.kv.get(f"{name}.{kind}_amax")
        if amax is None:
            raise PlanError(
                f"the stats have no {kind}_amax for {name}; were they measured on this model?"
            )
        scales.append(Constant(f"{name}.{kind}_scale", amax / KV_RANGE))
    return scales


def _kv_notes(
    scales: Sequence[Constant], family: str | None, engines: Iterable[Engine]
) -> Iterator[str]:
    """Yield which KV scales an engine does not read."""
    for unread in unread_kv_scales(family, engines) if scales else ():
        yield (
            f"{ENGINE_NAMES[unread.engine]}: does not read the KV scales of {unread.layers} and "
            f"uses 1.0 there ({unread.source})"
        )
