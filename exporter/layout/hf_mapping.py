# SPDX-License-Identifier: Apache-2.0
"""Transformers' own conversion between hub checkpoints and its models: the one room that touches
those internals.

Read from transformers 5.12 to 5.23: `get_model_conversion_mapping`, the patterns of its renamings
and converters, and what each operation does. Operations become `Op` values here; everything behind
is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.layout.pieces import Grid, Op, Shape, run, whole
from verifier.errors import UnsupportedConversion


@dataclass(frozen=True, slots=True)
class Place:
    """Where a hub tensor is in memory; ``converted`` where it is only a part or another shape of
    that parameter.
    """

    key: str
    converted: bool


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Return the parameter or buffer that transformers' loader makes of each hub tensor."""
    return {
        n: Place(key, pattern is not None)
        for n, (key, pattern) in _Mapping(model).keys(names).items()
    }


def hub_names(model: Any) -> dict[str, Shape]:
    """Return names and shapes of what `save_pretrained` would write, without allocating anything.

    Raises:
        UnsupportedConversion: transformers cannot revert its own conversion.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    state = {k: v.to("meta") for k, v in saved(model).items()}
    try:
        found: Mapping[str, Any] = revert_weight_conversion(model, state)
    except (ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UnsupportedConversion("save_pretrained", "revert", family_of(model), said) from error
    return {n: tuple(t.shape) for n, t in found.items()}


def saved(model: Any) -> dict[str, Any]:
    """Return the parameters and buffers in memory that belong to a checkpoint: not the tied ones,
    not the ignored ones.
    """
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    gone = set(tied) | {k for k in state if any(re.search(p, k) for p in ignored)}
    return {k: v for k, v in state.items() if k not in gone}


def family_of(model: Any) -> str:
    """Return the model type, for messages."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def grids(model: Any, hub: Mapping[str, Shape]) -> tuple[dict[str, Grid], list[str]]:
    """Return by name in memory what of the hub tensors each tensor there is made of; and hub names
    without a place.

    Args:
        model: a transformers model; its parameters may be on the meta device.
        hub: names and logical shapes of a hub checkpoint's weights: they decide which conversion
            applies.

    Raises:
        UnsupportedConversion: naming key, operation and family.
    """
    mapping, family = _Mapping(model), family_of(model)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    found: dict[str, Grid] = {}
    outside = []
    for name, (key, pattern) in mapping.keys(hub).items():
        if pattern is not None:
            groups.setdefault(key, (mapping.converter(pattern), {}))[1].setdefault(
                pattern, []
            ).append(name)
        elif key in state:
            if key in found:
                raise UnsupportedConversion(
                    key, "rename", family, f"{found[key].pieces[0].hub} and {name} both become it"
                )
            found[key] = whole(name, hub[name])
        else:
            outside.append(name)
    for key, (converter, sources) in groups.items():
        made = _convert(key, converter, sources, hub, state, family, model.config)
        for target, grid in made.items():
            if target in found:
                raise UnsupportedConversion(target, "rename", family, "two conversions give it")
            if target in state:
                found[target] = grid
            else:
                outside += [p.hub for p in grid.pieces]
    return found, sorted(set(outside))


def _convert(
    key: str,
    converter: Any,
    sources: Mapping[str, list[str]],
    hub: Mapping[str, Shape],
    state: Mapping[str, Shape],
    family: str,
    config: Any,
) -> dict[str, Grid]:
    targets = _targets(key, converter)
    listed = [
        [whole(n, hub[n]) for n in sources[p]] for p in converter.source_patterns if p in sources
    ]
    lost = [p for p in converter.source_patterns if p not in sources]
    named = ", ".join(type(o).__name__ for o in converter.operations)
    if lost:
        raise UnsupportedConversion(key, named, family, f"the checkpoint has no {lost[0]} for it")
    try:
        ops = [_op(o, key, targets, state, family, config) for o in converter.operations]
        many = sum(1 for o in ops if o.kind in ("chunk", "unstack"))
        made = run(ops, listed, len(targets))
        if many and ops[-1].kind == "unstack":
            targets = [
                t.replace("*", str(i)) for t in targets for i in range(len(made) // len(targets))
            ]
    except ValueError as error:
        raise UnsupportedConversion(key, named, family, str(error)) from error
    if len(made) != len(targets):
        raise UnsupportedConversion(
            key, named, family, f"gives {len(made)} tensors for {len(targets)} names"
        )
    return dict(zip(targets, made, strict=True))


def _targets(key: str, converter: Any) -> list[str]:
    """Return the full names of what a converter gives, as the loader expands them: prefix and
    suffix of the first.
    """
    first, *others = converter.target_patterns
    if not others:
        return [key]
    prefix, found, suffix = key.partition(first)
    if (
        not found
    ):  # a capture group was filled in: the longest literal tail tells where the pattern stands
        return [key, *others]
    return [f"{prefix}{t}{suffix}" for t in (first, *others)]


def _op(
    op: Any, key: str, targets: list[str], state: Mapping[str, Shape], family: str, config: Any
) -> Op:
    kind = type(op).__name__
    if kind in ("MergeModulelist", "SplitModulelist"):
        return Op("stack" if kind == "MergeModulelist" else "unstack", op.dim)
    if kind == "Split" and all(t in state for t in targets):
        return Op("split", op.dim, sizes=tuple(state[t][op.dim] for t in targets))
    if kind == "Concatenate" and getattr(op, "num_shards_attribute", None) is None:
        return Op("concatenate", op.dim)
    if kind == "Chunk" and getattr(op, "num_shards_attribute", None) is None:
        return Op("chunk", op.dim)
    if kind == "Transpose":
        return Op(
            "transpose",
            op.dim0,
            op.dim1,
            state.get(key) if getattr(op, "check_dims", False) else None,
        )
    if kind == "Interleave":
        return Op("interleave" if op.inverse else "deinterleave", op.dim)
    if kind == "PermuteForRope":
        heads = getattr(getattr(config, op.subconfig_key or "", config), "num_attention_heads", 1)
        named = op.permute_layer_names
        only = (
            None
            if named is None
            else tuple(i for i, t in enumerate(targets) if any(n in t for n in named))
        )
        return Op("unrotary" if op.inverse else "rotary", 0, sizes=(heads,), only=only)
    if kind == "ErnieFuseAndSplitTextVisionExperts":
        return Op("share", op.stack_dim, op.concat_dim)
    raise UnsupportedConversion(
        key, kind, family, "an operation that is not known here; no other name is made up"
    )


class _Mapping:
    """The renamings and converters of a model, asked as the loader asks them."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
        from transformers.core_model_loading import WeightConverter, WeightRenaming  # noqa: PLC0415

        mapping = get_model_conversion_mapping(model)
        self._model, self._state = model, model.state_dict()
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]

    def keys(self, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """Return (name in memory, the converter's pattern or None) for hub names, in the loader's
        natural order.
        """
        from transformers.core_model_loading import rename_source_key  # noqa: PLC0415

        prefix, state = self._model.base_model_prefix, self._state
        found = {}
        for n in sorted(names, key=natural):
            key, pattern = rename_source_key(n, self._renamings, self._converters, prefix, state)
            if (
                key not in state and n in state
            ):  # the loader's own rule: a name of memory that a pattern hits by accident
                key, pattern = rename_source_key(n, [], [], prefix, state)
            found[n] = key, pattern
        return found

    def converter(self, pattern: str) -> Any:
        """Return the converter that has a source pattern."""
        return {p: c for c in self._converters for p in c.source_patterns}[pattern]


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key in which ``experts.2`` comes before ``experts.10``."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]
