# SPDX-License-Identifier: Apache-2.0
"""Decide what becomes of every tensor of a broken export: moved under its hub name, or the base's
in its place.

Headers in, a plan out. No byte of a quantized tensor changes; what cannot be known is refused by
name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from exporter.layout import Layout, Part
from exporter.layout.conventions import by_convention
from exporter.layout.siblings import SIBLINGS
from exporter.plan.model import Action, Copy, Origin, Plan, Take
from exporter.plan.sound import one_fate, require_sound
from exporter.plan.sources import NEVER_WRITTEN
from verifier.checkpoint import Checkpoint, Tensor
from verifier.errors import PlanError, UnsupportedConversion
from verifier.schemes import (
    KV_LEAVES,
    Format,
    Module,
    canonical,
    collapse,
    expert_key,
    gather,
    role,
    split,
)

Shape = tuple[int, ...]
_QUANTIZER = re.compile(r"(^|[._])(\w*quantizer)(\.|$)|\._(amax|pre_quant_scale|scale)$")
_DOWN = ("down_proj", "w2")


@dataclass(frozen=True, slots=True)
class Same:
    """An unquantized tensor that both checkpoints have; the base's is written."""

    take: Take
    base: Tensor


@dataclass(frozen=True)
class Repair:
    """A plan, and what it was read from: shown before anything is written, and proved by values.

    ``renamed`` and ``split`` name tensors of the broken checkpoint with what they become; ``same``
    are the unquantized tensors of both; ``missing`` are taken from the base; ``dropped`` are left
    out; ``doubtful`` are the quantized modules whose place was not given by their own name.
    """

    plan: Plan
    renamed: dict[str, str]
    split: dict[str, tuple[str, ...]]
    same: tuple[Same, ...]
    missing: tuple[str, ...]
    dropped: tuple[str, ...]
    quantized: tuple[Take, ...]
    doubtful: tuple[str, ...] = field(default=())


def repair(
    broken: Checkpoint, base: Checkpoint, layout: Callable[[], Layout | None] | None = None
) -> Repair:
    """Return how a broken export is made right.

    Args:
        broken: quantized tensors under wrong names, in wrong stacks or under a wrong description.
        base: the checkpoint that it was made from, in hub layout.
        layout: gives that of the model in transformers' memory, or None where transformers does not
            have it; it is asked only where a name is not the base's own.

    Raises:
        PlanError: what the checkpoints do not allow: a lost tensor that was quantized, a name that
            nothing explains, blocks along the wrong axis, a format that cannot be described.
        UnsupportedConversion: a tensor that cannot be brought to the hub's layout, by name.
    """
    require_sound(broken, "the broken export", described=False)
    require_sound(base, "the base")
    takes, dropped, doubtful = _takes(broken, base, layout)
    parts = _modules(takes)
    targets = gather(base.tensors.values())
    _require_known(parts, targets, base)
    actions: list[Action] = []
    same: list[Same] = []
    quantized: list[Take] = []
    missing: list[str] = []
    left: list[tuple[Origin, str, str]] = [("source", n, "dropped") for n in dropped]
    lossy = {collapse(n) for n, m in parts.items() if m.quantized}
    for name, target in targets.items():
        mine = parts.get(name)
        if mine is not None and (mine.quantized or target.quantized):
            moved = [takes[t.name] for t in mine.parts.values()]
            quantized += moved if mine.quantized else []
            actions += moved
            left += [("onto", t.name, "the export's is kept") for t in target.parts.values()]
            continue
        actions += [takes[t.name] for t in _beyond(mine, target, base)]
        for tensor in target.parts.values():
            take = takes.get(tensor.name)
            if take is None:
                _require_untouched(target, lossy, base)
                missing.append(tensor.name)
            else:
                same.append(Same(take, tensor))
                left.append(("source", take.tensor.name, "the base's is written"))
            actions.append(Copy(tensor, "onto"))
    if not quantized:
        raise PlanError(f"{broken.uri}: nothing in it is quantized, so there is nothing to keep")
    plan = Plan("repair", "repair", broken, base, tuple(actions), tuple(dict.fromkeys(left)), {})
    one_fate(plan)
    renamed, cut = _changes(takes.values())
    return Repair(
        plan,
        renamed,
        cut,
        tuple(same),
        tuple(missing),
        tuple(dropped),
        tuple(quantized),
        tuple(sorted(doubtful)),
    )


def _takes(
    broken: Checkpoint, base: Checkpoint, layout_of: Callable[[], Layout | None] | None
) -> tuple[dict[str, Take], list[str], set[str]]:
    """Return by hub name what of the broken export becomes it, the names that are left out, and
    whose place is doubtful.
    """
    hub, family = logical(base), str(base.model_type)
    known = set(gather(base.tensors.values()))
    takes: dict[str, Take] = {}
    odd: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, tensor in broken.tensors.items():
        if _QUANTIZER.search(name):
            dropped.append(name)
        elif split(name)[0] in known:
            _add(takes, Take(name, tensor, "source"), family)
        else:
            odd[name] = tensor
    doubtful: set[str] = set()
    _refuse_wrong_axis(odd.values(), base)
    layout = layout_of() if layout_of is not None and odd else None
    weights = {n: s for n, s in logical(broken).items() if n in odd and not _beside(n, odd)}
    mapped = {n for n in weights if layout is not None and _has(layout, n)}
    guessed = by_convention({n: s for n, s in weights.items() if n not in mapped}, hub, family)
    for name, tensor in odd.items():
        parts: list[Part] | None = None
        for found in (layout, guessed):
            if found is not None and parts is None and _has(found, name):
                parts = found.parts(name, tensor.shape)
        if parts is None:
            if role(name.removesuffix(".weight")) == "lm_head" and (base.config or {}).get(
                "tie_word_embeddings"
            ):
                dropped.append(name)
                continue
            raise _unknown(name, hub)
        for part in parts:
            _add(takes, _take(part, tensor, family), family)
            doubtful.add(split(part.hub)[0])
    return takes, dropped, doubtful


def logical(ckpt: Checkpoint) -> dict[str, Shape]:
    """Return name and shape, in elements, of every weight and other tensor that is no scale."""
    found: dict[str, Shape] = {}
    for module in gather(ckpt.tensors.values()).values():
        for tensor in module.parts.values():
            name = canonical(tensor.name)
            if name is None:
                continue
            packed = tensor is module.weight and tensor.dtype == "U8" and len(tensor.shape) >= 2
            dims = module.dims if tensor is module.weight and "blocks" in module.parts else None
            found[name] = dims or (
                (*tensor.shape[:-1], tensor.shape[-1] * 2) if packed else tensor.shape
            )
    return found


def _beside(name: str, odd: Mapping[str, Tensor]) -> bool:
    """Whether a name is a sibling joined by ``_`` to a bare parameter:
    ``gate_up_proj_weight_scale``.
    """
    return any(name.removesuffix(f"_{s}") in odd for s in SIBLINGS if name.endswith(f"_{s}"))


def _has(layout: Layout, name: str) -> bool:
    try:
        layout.find(name)
    except UnsupportedConversion:
        return False
    return True


def _take(part: Part, tensor: Tensor, family: str) -> Take:
    moved = part.transfer
    if tuple(c.length for c in moved.hub) != moved.hub_shape or any(c.drop for c in moved.hub):
        raise UnsupportedConversion(
            tensor.name,
            "join",
            family,
            f"the hub's {part.hub} holds more than it; quantized tensors are not joined",
        )
    cuts = tuple((c.start, c.step, c.length, c.drop) for c in moved.memory)
    return Take(part.hub, tensor, "source", cuts, moved.order)


def _add(takes: dict[str, Take], take: Take, family: str) -> None:
    other = takes.setdefault(take.name, take)
    if other is not take:
        said = f"{other.tensor.name} becomes {take.name} too"
        raise UnsupportedConversion(take.tensor.name, "rename", family, said)


def _modules(takes: Mapping[str, Take]) -> dict[str, Module]:
    """Return the modules of the result as far as the broken export gives them."""
    found = []
    for name, take in takes.items():
        (spec,) = take.specs
        found.append(Tensor(name, spec.dtype, spec.shape, take.tensor.file, 0, spec.nbytes))
    return gather(found)


def _require_known(
    parts: Mapping[str, Module], targets: Mapping[str, Module], base: Checkpoint
) -> None:
    """Refuse quantized modules that cannot be right, or that no declaration can describe.

    Raises:
        PlanError: naming the module and why.
    """
    for name, module in parts.items():
        if not module.quantized:
            continue
        target, weight = targets[name], module.weight
        if "pre_quant_scale" in module.parts:
            raise PlanError(
                f"{name} has a pre_quant_scale (AWQ): what was folded into its neighbours cannot be known, and no "
                "declaration of it is written here"
            )
        if weight is None:
            raise PlanError(
                f"{name}: {', '.join(module.parts)} without a weight; codes cannot be made from scales"
            )
        if module.dims is None:
            said = f"{weight.name} {list(weight.shape)} is a quantized stack, as the base's is"
            raise PlanError(
                f"{said}; only two-dimensional quantized weights are judged and described here"
            )
        if target.dims is not None and target.dims != module.dims:
            _refuse_shape(module, target.dims)
        shown = module.inferred_format
        if shown is None or shown.name in NEVER_WRITTEN:
            what = (
                shown.algo
                if shown is not None
                else f"{weight.dtype} with {', '.join(module.scales) or 'no scale'}"
            )
            raise PlanError(
                f"{name}: {what}: its format cannot be told or is not written here; export it anew"
            )
        _require_siblings(module, shown, module.dims)
    _require_input_scales(parts)


def _require_siblings(module: Module, shown: Format, dims: tuple[int, int]) -> None:
    for sibling in shown.siblings:
        found = [module.parts[leaf] for leaf in sibling.leaves if leaf in module.parts]
        if not found and sibling.required and sibling.leaves != ("input_scale",):
            raise PlanError(
                f"{module.name}: {sibling.leaves[0]} is lost, so its values cannot be known; export it anew"
            )
        for tensor in found:
            if tensor.dtype not in sibling.dtypes or tensor.shape not in sibling.shapes(*dims):
                wanted = f"{' or '.join(sibling.dtypes)} {list(sibling.shapes(*dims)[0])}"
                said = f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, where {shown.algo} has {wanted}"
                raise PlanError(f"{said}: its values cannot be known; export it anew")


def _require_input_scales(parts: Mapping[str, Module]) -> None:
    """Refuse modules of one kind of which some have an activation scale and some have lost it.

    Raises:
        PlanError: naming the first that has none.
    """
    kinds: dict[str, list[Module]] = {}
    for name, module in parts.items():
        if module.quantized:
            kinds.setdefault(collapse(name), []).append(module)
    for members in kinds.values():
        without = [m.name for m in members if "input_scale" not in m.parts]
        if without and len(without) != len(members):
            raise PlanError(
                f"{without[0]} has no input_scale, and {len(members) - len(without):,} modules like it have one: it is lost "
                "and cannot be known; calibrate and export anew"
            )


def _refuse_shape(module: Module, wanted: tuple[int, int]) -> None:
    """Refuse a quantized weight of another shape than the base's, saying how it came about where
    that is plain.

    Raises:
        PlanError: always.
    """
    name, dims, weight, scale = module.name, module.dims or (0, 0), module.weight, module.scale
    packed = weight is not None and weight.dtype == "U8"
    stored = (wanted[0], wanted[1] // 2) if packed else wanted
    if (
        weight is not None
        and weight.shape == stored[::-1]
        and scale is not None
        and scale.shape[:1] != (dims[0],)
    ):
        raise PlanError(
            f"{name}: weight {list(weight.shape)} and scale {list(scale.shape)} are stored transposed, and the base is "
            f"[{wanted[0]}, {wanted[1]}]: every byte would have to move, which is no repair; export it anew"
        )
    if dims == wanted[::-1]:
        raise PlanError(
            f"{name} is stored [{dims[0]}, {dims[1]}] where the base is [{wanted[0]}, {wanted[1]}]: it was quantized "
            "transposed, its blocks lie along the output axis; engines need them along the input, so export it anew"
        )
    raise PlanError(
        f"{name} is [{dims[0]}, {dims[1]}], and the base has [{wanted[0]}, {wanted[1]}]; is it the right base?"
    )


def _beyond(mine: Module | None, target: Module, base: Checkpoint) -> list[Tensor]:
    """Return the KV scales of an unquantized module; the base has none.

    Raises:
        PlanError: another tensor that the base's module does not have.
    """
    more = {
        leaf: t
        for leaf, t in (mine.parts if mine is not None else {}).items()
        if leaf not in target.parts
    }
    for leaf, tensor in more.items():
        if leaf not in KV_LEAVES:
            raise PlanError(
                f"{tensor.name}: {base.uri} has {target.name} without a {leaf}; where it belongs is not known"
            )
    return list(more.values())


def _require_untouched(target: Module, lossy: set[str], base: Checkpoint) -> None:
    """Refuse to fill in what was quantized: the base's values are not the export's.

    Raises:
        PlanError: naming the tensor.
    """
    name = target.name
    quantized_expert = expert_key(name) is not None and any(".experts.*." in n for n in lossy)
    if collapse(name) in lossy or quantized_expert:
        raise PlanError(
            f"{name} is in {base.uri} and not in the export, where modules like it are quantized: its codes are lost and "
            "cannot be known; export it anew"
        )
    if target.quantized:
        raise PlanError(
            f"{name} is not in the export, and {base.uri} holds it quantized only; what it was cannot be known"
        )


def _refuse_wrong_axis(odd: Iterable[Tensor], base: Checkpoint) -> None:
    """Refuse experts of a transposed stack that were quantized as if it were not: no hub has a
    place for their blocks.

    Raises:
        PlanError: naming the first down projection whose input is as wide as the model.
    """
    hidden = _hidden(base)
    for name, module in gather(odd).items():
        expert, dims = expert_key(name), module.dims
        if expert is None or expert.leaf not in _DOWN or not module.quantized or dims is None:
            continue
        if dims[1] == hidden != dims[0]:
            raise PlanError(
                f"{name} is [{dims[0]}, {dims[1]}], and a down projection is [{hidden}, …] (hidden_size {hidden}): the "
                "stack that it was cut from is [experts, in, out], so its blocks lie along the output axis, the wrong one; "
                "that cannot be undone without quantizing anew"
            )


def _unknown(name: str, hub: Mapping[str, Shape]) -> PlanError:
    """Return why a tensor that has no place is refused."""
    expert = expert_key(split(name)[0])
    stacks = [
        n
        for n, s in hub.items()
        if len(s) == 3 and expert and n.startswith(expert.container.rpartition(".")[0])
    ]
    if not stacks:
        return PlanError(
            f"{name}: neither transformers' mapping nor any spelling tells which tensor of the base it is"
        )
    return PlanError(
        f"{name}: the base keeps the experts of this layer in stacks ({stacks[0]} {list(hub[stacks[0]])}); what was taken "
        "apart is not joined again"
    )


def _hidden(base: Checkpoint) -> int | None:
    config = base.config or {}
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    value = text.get("hidden_size") if isinstance(text, Mapping) else None
    return value if type(value) is int else None


def _changes(takes: Iterable[Take]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    became: dict[str, list[str]] = {}
    whole: set[str] = set()
    for take in takes:
        became.setdefault(take.tensor.name, []).append(take.name)
        if take.whole:
            whole.add(take.tensor.name)
    names = Counter({n: len(v) for n, v in became.items()})
    renamed = {n: v[0] for n, v in became.items() if names[n] == 1 and n in whole and v[0] != n}
    cut = {n: tuple(v) for n, v in became.items() if names[n] > 1 or n not in whole}
    return renamed, cut
