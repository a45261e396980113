# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of a broken export: moved under its hub name, or replaced by
the base's.

Headers in, a plan out. No byte of a quantized tensor changes; what cannot be known is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from exporter.layout import HubPart, Layout
from exporter.layout.conventions import by_convention
from exporter.layout.siblings import SIBLINGS
from exporter.plan.model import Action, Copy, Plan, Skipped, Take
from exporter.plan.sound import require_every_tensor_once, require_sound
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
class Replaced:
    """An unquantized tensor that both checkpoints have; the base's is written."""

    take: Take
    base: Tensor


@dataclass(frozen=True)
class Repair:
    """A plan, and what it is based on: printed before anything is written, and proved by values.

    Attributes:
        plan: what is written.
        renamed: tensors of the broken checkpoint that are renamed, with their new names.
        split: tensors of the broken checkpoint that are divided, with the names of their parts.
        replaced: the unquantized tensors of both checkpoints.
        missing: tensors taken from the base, which the broken checkpoint lacks.
        dropped: tensors that are left out.
        quantized: the quantized tensors.
        uncertain: the quantized modules whose place is not stated by their own name.
    """

    plan: Plan
    renamed: dict[str, str]
    split: dict[str, tuple[str, ...]]
    replaced: tuple[Replaced, ...]
    missing: tuple[str, ...]
    dropped: tuple[str, ...]
    quantized: tuple[Take, ...]
    uncertain: tuple[str, ...] = ()


def repair(
    broken: Checkpoint, base: Checkpoint, layout: Callable[[], Layout | None] | None = None
) -> Repair:
    """Return how a broken export is fixed.

    Args:
        broken: quantized tensors under wrong names, in wrong stacks or with a wrong declaration.
        base: the checkpoint that it was made from, in hub layout.
        layout: returns that of the model in transformers' memory, or None where transformers does
            not have the model; called only where a name is not the base's own.

    Raises:
        PlanError: what the checkpoints do not allow: a missing tensor that was quantized, a name
            without an explanation, blocks along the wrong axis, a format that cannot be declared.
        UnsupportedConversion: a tensor that cannot be brought to the hub's layout, by name.
    """
    require_sound(broken, "the broken export", described=False)
    require_sound(base, "the base")
    takes, dropped, uncertain = _Takes(broken, base).all(layout)
    parts = _modules(takes)
    targets = gather(base.tensors.values())
    _require_known(parts, targets)
    actions: list[Action] = []
    replaced: list[Replaced] = []
    quantized: list[Take] = []
    missing: list[str] = []
    skipped: list[Skipped] = [("source", n, "dropped") for n in dropped]
    quantized_kinds = {collapse(n) for n, m in parts.items() if m.quantized}
    for name, target in targets.items():
        module = parts.get(name)
        if module is not None and (module.quantized or target.quantized):
            moved = [takes[t.name] for t in module.parts.values()]
            quantized += moved if module.quantized else []
            actions += moved
            skipped += [("onto", t.name, "the export's is kept") for t in target.parts.values()]
            continue
        actions += [takes[t.name] for t in _kv_scales(module, target, base)]
        for tensor in target.parts.values():
            take = takes.get(tensor.name)
            if take is None:
                _require_unquantized(target, quantized_kinds, base)
                missing.append(tensor.name)
            else:
                replaced.append(Replaced(take, tensor))
                skipped.append(("source", take.tensor.name, "the base's is written"))
            actions.append(Copy(tensor, "onto"))
    if not quantized:
        raise PlanError(f"{broken.uri}: nothing in it is quantized, so there is nothing to keep")
    plan = Plan("repair", "repair", broken, base, tuple(actions), tuple(dict.fromkeys(skipped)))
    require_every_tensor_once(plan)
    renamed, divided = _changes(takes.values())
    return Repair(
        plan,
        renamed,
        divided,
        tuple(replaced),
        tuple(missing),
        tuple(dropped),
        tuple(quantized),
        tuple(sorted(uncertain)),
    )


class _Takes:
    """Which hub tensor each tensor of the broken export becomes."""

    def __init__(self, broken: Checkpoint, base: Checkpoint) -> None:
        self._broken, self._base = broken, base
        self._hub, self._family = logical(base), str(base.model_type)
        self._takes: dict[str, Take] = {}

    def all(
        self, layout_of: Callable[[], Layout | None] | None
    ) -> tuple[dict[str, Take], list[str], set[str]]:
        """Return by hub name what becomes it, the names that are left out, and the modules whose
        place is uncertain.
        """
        known = set(gather(self._base.tensors.values()))
        misnamed: dict[str, Tensor] = {}
        dropped: list[str] = []
        for name, tensor in self._broken.tensors.items():
            if _QUANTIZER.search(name):
                dropped.append(name)
            elif split(name)[0] in known:
                self._add(Take(name, tensor, "source"))
            else:
                misnamed[name] = tensor
        _refuse_wrong_axis(misnamed.values(), self._base)
        layouts = self._layouts(misnamed, layout_of) if misnamed else []
        tied = bool((self._base.config or {}).get("tie_word_embeddings"))
        uncertain: set[str] = set()
        for name, tensor in misnamed.items():
            layout = next((x for x in layouts if _explains(x, name)), None)
            if layout is not None:
                for part in layout.parts(name, tensor.shape):
                    self._add(self._take(part, tensor))
                    uncertain.add(split(part.hub)[0])
            elif tied and role(name.removesuffix(".weight")) == "lm_head":
                dropped.append(name)
            else:
                raise _unknown(name, self._hub)
        return self._takes, dropped, uncertain

    def _layouts(
        self, misnamed: Mapping[str, Tensor], layout_of: Callable[[], Layout | None] | None
    ) -> list[Layout]:
        """Return transformers' layout, where it has one, and that of the field's own spellings for
        the weights that it does not explain.
        """
        layout = layout_of() if layout_of is not None else None
        layouts = [layout] if layout is not None else []
        weights = {
            name: shape
            for name, shape in logical(self._broken).items()
            if name in misnamed and not _is_joined_sibling(name, misnamed)
        }
        rest = {n: s for n, s in weights.items() if not any(_explains(x, n) for x in layouts)}
        return [*layouts, by_convention(rest, self._hub, self._family)]

    def _take(self, part: HubPart, tensor: Tensor) -> Take:
        moved = part.transfer
        whole = tuple(c.length for c in moved.hub) == moved.hub_shape
        if not whole or any(c.drop for c in moved.hub):
            raise UnsupportedConversion(
                tensor.name,
                "join",
                self._family,
                f"it is only a part of the hub's {part.hub}; quantized tensors are not joined",
            )
        return Take(part.hub, tensor, "source", moved.memory, moved.order)

    def _add(self, take: Take) -> None:
        other = self._takes.setdefault(take.name, take)
        if other is not take:
            raise UnsupportedConversion(
                take.tensor.name,
                "rename",
                self._family,
                f"{other.tensor.name} becomes {take.name} too",
            )


def logical(ckpt: Checkpoint) -> dict[str, Shape]:
    """Return name and shape, in elements, of every weight and other tensor that is not a scale."""
    shapes: dict[str, Shape] = {}
    for module in gather(ckpt.tensors.values()).values():
        for tensor in module.parts.values():
            name = canonical(tensor.name)
            if name is None:
                continue
            is_weight = tensor is module.weight
            dims = module.dims if is_weight and "blocks" in module.parts else None
            if dims is not None:
                shapes[name] = dims
            elif is_weight and tensor.dtype == "U8" and len(tensor.shape) >= 2:
                shapes[name] = (*tensor.shape[:-1], tensor.shape[-1] * 2)
            else:
                shapes[name] = tensor.shape
    return shapes


def _is_joined_sibling(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a name is a sibling joined by ``_`` to a bare parameter:
    ``gate_up_proj_weight_scale``.
    """
    leaves = (s for s in SIBLINGS if name.endswith(f"_{s}"))
    return any(name.removesuffix(f"_{leaf}") in tensors for leaf in leaves)


def _explains(layout: Layout, name: str) -> bool:
    try:
        layout.find(name)
    except UnsupportedConversion:
        return False
    return True


def _modules(takes: Mapping[str, Take]) -> dict[str, Module]:
    """Return the modules of the result, as far as the broken export holds them."""
    tensors = []
    for name, take in takes.items():
        (spec,) = take.specs
        tensors.append(Tensor(name, spec.dtype, spec.shape, take.tensor.file, 0, spec.nbytes))
    return gather(tensors)


def _require_known(parts: Mapping[str, Module], targets: Mapping[str, Module]) -> None:
    """Refuse quantized modules that cannot be right, or that no declaration can describe.

    Raises:
        PlanError: naming the module and why.
    """
    for name, module in parts.items():
        if module.quantized:
            _require_module(name, module, targets[name])
    _require_input_scales(parts)


def _require_module(name: str, module: Module, target: Module) -> None:
    weight = module.weight
    if "pre_quant_scale" in module.parts:
        raise PlanError(
            f"{name} has a pre_quant_scale (AWQ): what was folded into its neighbors cannot be "
            "recovered, and ckptgate writes no declaration of it"
        )
    if weight is None:
        raise PlanError(
            f"{name}: {', '.join(module.parts)} without a weight; values cannot be recovered from "
            "scales"
        )
    if module.dims is None:
        raise PlanError(
            f"{weight.name} {list(weight.shape)} is a quantized stack, as in the base; repair "
            "handles 2-D quantized weights only"
        )
    if target.dims is not None and target.dims != module.dims:
        raise _wrong_shape(module, module.dims, target.dims)
    fmt = module.inferred_format
    if fmt is None or fmt.name in NEVER_WRITTEN:
        scales = ", ".join(module.scales) or "no scale"
        text = fmt.algo if fmt is not None else f"{weight.dtype} with {scales}"
        raise PlanError(
            f"{name}: {text}: its format cannot be inferred or is not written by ckptgate; export "
            "it again"
        )
    _require_siblings(module, fmt, module.dims)


def _require_siblings(module: Module, fmt: Format, dims: tuple[int, int]) -> None:
    for sibling in fmt.siblings:
        tensors = [module.parts[leaf] for leaf in sibling.leaves if leaf in module.parts]
        if not tensors and sibling.required and sibling.leaves != ("input_scale",):
            raise PlanError(
                f"{module.name}: {sibling.leaves[0]} is missing and cannot be recovered; export it "
                "again"
            )
        for tensor in tensors:
            if tensor.dtype not in sibling.dtypes or tensor.shape not in sibling.shapes(*dims):
                expected = f"{' or '.join(sibling.dtypes)} {list(sibling.shapes(*dims)[0])}"
                raise PlanError(
                    f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, where {fmt.algo} has "
                    f"{expected}: its values cannot be recovered; export it again"
                )


def _require_input_scales(parts: Mapping[str, Module]) -> None:
    """Refuse modules of one kind of which some have an activation scale and some do not.

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
                f"{without[0]} has no input_scale, and {len(members) - len(without):,} modules "
                "like it have one: it is missing and cannot be recovered; calibrate and export "
                "again"
            )


def _wrong_shape(module: Module, dims: tuple[int, int], base: tuple[int, int]) -> PlanError:
    """Return why a quantized weight whose shape is not the base's is refused, with the cause where
    it is plain.
    """
    name, weight, scale = module.name, module.weight, module.scale
    out, in_ = base
    if weight is not None and scale is not None:
        packed = weight.dtype == "U8"
        transposed = weight.shape == (in_ // 2 if packed else in_, out)
        if transposed and scale.shape[:1] != dims[:1]:
            return PlanError(
                f"{name}: weight {list(weight.shape)} and scale {list(scale.shape)} are stored "
                f"transposed, and the base is [{out}, {in_}]: every byte would have to move, which "
                "repair does not do; export it again"
            )
    if dims == base[::-1]:
        return PlanError(
            f"{name} is [{dims[0]}, {dims[1]}] where the base is [{out}, {in_}]: it was quantized "
            "transposed, so its blocks run along the output axis; engines need them along the "
            "input axis; export it again"
        )
    return PlanError(
        f"{name} is [{dims[0]}, {dims[1]}] and the base has [{out}, {in_}]; is it the right base?"
    )


def _kv_scales(module: Module | None, target: Module, base: Checkpoint) -> list[Tensor]:
    """Return the KV scales of an unquantized module; the base has none.

    Raises:
        PlanError: another tensor that the base's module does not have.
    """
    scales = []
    for leaf, tensor in (module.parts if module is not None else {}).items():
        if leaf in target.parts:
            continue
        if leaf not in KV_LEAVES:
            raise PlanError(
                f"{tensor.name}: {base.uri} has {target.name} without a {leaf}; its place is not "
                "known"
            )
        scales.append(tensor)
    return scales


def _require_unquantized(target: Module, quantized_kinds: set[str], base: Checkpoint) -> None:
    """Refuse to fill in a tensor that was quantized: the base's values are not the export's.

    Raises:
        PlanError: naming the tensor.
    """
    name = target.name
    experts_quantized = any(".experts.*." in kind for kind in quantized_kinds)
    if collapse(name) in quantized_kinds or (expert_key(name) is not None and experts_quantized):
        raise PlanError(
            f"{name} is in {base.uri} and not in the export, where modules like it are quantized: "
            "its values are missing and cannot be recovered; export it again"
        )
    if target.quantized:
        raise PlanError(
            f"{name} is not in the export, and {base.uri} holds it quantized only; its values "
            "cannot be recovered"
        )


def _refuse_wrong_axis(tensors: Iterable[Tensor], base: Checkpoint) -> None:
    """Refuse experts of a transposed stack that were quantized as if it were not: no hub layout has
    a place for their blocks.

    Raises:
        PlanError: naming the first down projection whose input is as wide as the model.
    """
    hidden = _hidden_size(base)
    for name, module in gather(tensors).items():
        expert, dims = expert_key(name), module.dims
        if expert is None or expert.leaf not in _DOWN or not module.quantized or dims is None:
            continue
        if dims[1] == hidden != dims[0]:
            raise PlanError(
                f"{name} is [{dims[0]}, {dims[1]}], and a down projection is [{hidden}, …] "
                f"(hidden_size {hidden}): it was cut from a stack [experts, in, out], so its "
                "blocks run along the output axis, the wrong one; fixing that takes re-quantizing"
            )


def _unknown(name: str, hub: Mapping[str, Shape]) -> PlanError:
    """Return why a tensor without a place is refused."""
    expert = expert_key(split(name)[0])
    if expert is not None:
        layer = expert.container.rpartition(".")[0]
        stacks = [n for n, s in hub.items() if len(s) == 3 and n.startswith(layer)]
        if stacks:
            return PlanError(
                f"{name}: the base keeps the experts of this layer in stacks ({stacks[0]} "
                f"{list(hub[stacks[0]])}); repair does not stack single experts"
            )
    return PlanError(
        f"{name}: neither transformers' mapping nor a known spelling explains which tensor of the "
        "base it is"
    )


def _hidden_size(base: Checkpoint) -> int | None:
    config = base.config or {}
    text = config.get("text_config")
    value = (text if isinstance(text, Mapping) else config).get("hidden_size")
    return value if type(value) is int else None


def _changes(takes: Iterable[Take]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the tensors that are renamed as a whole, and those that are divided."""
    by_tensor: dict[str, list[Take]] = {}
    for take in takes:
        by_tensor.setdefault(take.tensor.name, []).append(take)
    renamed: dict[str, str] = {}
    divided: dict[str, tuple[str, ...]] = {}
    for name, parts in by_tensor.items():
        if len(parts) > 1 or not parts[0].whole:
            divided[name] = tuple(take.name for take in parts)
        elif parts[0].name != name:
            renamed[name] = parts[0].name
    return renamed, divided
