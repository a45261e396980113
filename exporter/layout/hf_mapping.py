# SPDX-License-Identifier: Apache-2.0
"""The layout of a transformers model: its own conversion between hub checkpoints and memory, as
operations on names and shapes.

Read from transformers 5.12 to 5.23: the patterns of its renamings and converters
(`verifier.load.hf.KeyMapping`), and what each operation does. Operations become `Op` values here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporter.detect import detect
from exporter.layout.grids import Grid, Op, Shape, apply_ops, whole
from exporter.layout.layout import Layout
from verifier.errors import UnsupportedConversion
from verifier.load import hf
from verifier.text import counted


def of_model(model: Any, hub: Mapping[str, Shape] | None = None) -> Layout:
    """Return the proved layout of a transformers model.

    Args:
        model: on any device, also the meta device; its class and config decide, its values do not.
        hub: names and logical shapes of the weights of the hub checkpoint that it was loaded from.
            They decide where transformers' mapping is not a bijection; without them, those that
            `save_pretrained` would write.

    Raises:
        UnsupportedConversion: an unknown operation, names that collide, a tensor of the model that
            no hub tensor fills; naming key, operation and family.
    """
    family = family_of(model)
    hub_shapes = dict(hub) if hub is not None else hub_names(model)
    memory, outside = _grids(model, hub_shapes)
    missing = [key for key in saved(model) if key not in memory]
    if missing:
        raise UnsupportedConversion(
            missing[0],
            "rename",
            family,
            f"no hub tensor becomes it ({counted(len(missing), 'such tensor')}); pass the source "
            "checkpoint",
        )
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, grid in memory.items():
        if grid.shape != shapes[key]:
            raise UnsupportedConversion(
                key,
                "shape",
                family,
                f"the conversion gives {list(grid.shape)}, the model has {list(shapes[key])}",
            )
    stacks = [s for s in detect(model).stacks if s.transposed]
    transposed = frozenset(f"{s.path}.{leaf}" for s in stacks for leaf in (s.first, s.down))
    inside = {name: shape for name, shape in hub_shapes.items() if name not in outside}
    return Layout(family, memory, inside, transposed, tuple(outside)).prove()


def hub_names(model: Any) -> dict[str, Shape]:
    """Return names and shapes that `save_pretrained` would write, without allocating anything.

    Raises:
        UnsupportedConversion: transformers cannot revert its own conversion.
    """
    state = {key: value.to("meta") for key, value in saved(model).items()}
    try:
        tensors = hf.saved_tensors(model, state)
    except hf.BUILD_ERRORS as error:
        raise UnsupportedConversion(
            "save_pretrained", "revert", family_of(model), hf.one_line(error)
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def saved(model: Any) -> dict[str, Any]:
    """Return the parameters and buffers that belong into a checkpoint: neither tied nor ignored."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or ()
    ignored = {key for key in state if any(re.search(p, key) for p in patterns)}
    return {key: value for key, value in state.items() if key not in ignored | set(tied)}


def family_of(model: Any) -> str:
    """Return the model type, for messages."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def _grids(model: Any, hub: Mapping[str, Shape]) -> tuple[dict[str, Grid], list[str]]:
    """Return by name in memory the regions of hub tensors that a tensor is made of, and the hub
    tensors that have no place in memory.

    Args:
        model: a transformers model; its parameters may be on the meta device.
        hub: names and logical shapes of a hub checkpoint's weights: they decide which conversion
            applies.

    Raises:
        UnsupportedConversion: naming key, operation and family.
    """
    mapping, conversion = hf.KeyMapping(model), _Conversion(model, hub)
    state, family = conversion.state, conversion.family
    converted: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    grids: dict[str, Grid] = {}
    outside: set[str] = set()
    for name, key in mapping.keys(hub).items():
        if key.converter is not None:
            converter = mapping.converter(key.converter)
            sources = converted.setdefault(key.name, (converter, {}))[1]
            sources.setdefault(key.converter, []).append(name)
        elif key.name not in state:
            outside.add(name)
        elif key.name in grids:
            other = grids[key.name].regions[0].hub
            raise UnsupportedConversion(
                key.name, "rename", family, f"{other} and {name} both become it"
            )
        else:
            grids[key.name] = whole(name, hub[name])
    for key_name, (converter, sources) in converted.items():
        for target, grid in conversion.run(key_name, converter, sources).items():
            if target in grids:
                raise UnsupportedConversion(target, "rename", family, "two conversions give it")
            if target in state:
                grids[target] = grid
            else:
                outside |= {region.hub for region in grid.regions}
    return grids, sorted(outside)


class _Conversion:
    """Runs transformers' converters of one model on the shapes of its hub tensors."""

    def __init__(self, model: Any, hub: Mapping[str, Shape]) -> None:
        self.family = family_of(model)
        self.state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        self._config = model.config
        self._hub = hub

    def run(self, key: str, converter: Any, sources: Mapping[str, list[str]]) -> dict[str, Grid]:
        """Return by name in memory what a converter makes.

        Args:
            key: the first name that it gives.
            converter: transformers' converter.
            sources: its hub tensors by source pattern.

        Raises:
            UnsupportedConversion: naming key, operations and family.
        """
        operations = ", ".join(type(op).__name__ for op in converter.operations)
        missing = [p for p in converter.source_patterns if p not in sources]
        if missing:
            raise UnsupportedConversion(
                key, operations, self.family, f"the checkpoint has no {missing[0]} for it"
            )
        groups = [
            [whole(name, self._hub[name]) for name in sources[p]] for p in converter.source_patterns
        ]
        targets = _targets(key, converter)
        try:
            ops = [self._op(op, key, targets) for op in converter.operations]
            grids = apply_ops(ops, groups, len(targets))
        except ValueError as error:
            raise UnsupportedConversion(key, operations, self.family, str(error)) from error
        if ops[-1].kind == "unstack":
            count = len(grids) // len(targets)
            targets = [t.replace("*", str(i)) for t in targets for i in range(count)]
        if len(grids) != len(targets):
            raise UnsupportedConversion(
                key,
                operations,
                self.family,
                f"gives {counted(len(grids), 'tensor')} for {counted(len(targets), 'name')}",
            )
        return dict(zip(targets, grids, strict=True))

    def _op(self, op: Any, key: str, targets: list[str]) -> Op:
        kind = type(op).__name__
        sharded = getattr(op, "num_shards_attribute", None) is not None
        if kind == "MergeModulelist":
            return Op("stack", op.dim)
        if kind == "SplitModulelist":
            return Op("unstack", op.dim)
        if kind == "Split" and all(t in self.state for t in targets):
            return Op("split", op.dim, sizes=tuple(self.state[t][op.dim] for t in targets))
        if kind in ("Concatenate", "Chunk") and not sharded:
            return Op(kind.lower(), op.dim)
        if kind == "Transpose":
            unless = self.state.get(key) if getattr(op, "check_dims", False) else None
            return Op("transpose", op.dim0, op.dim1, unless)
        if kind == "Interleave":
            return Op("interleave" if op.inverse else "deinterleave", op.dim)
        if kind == "PermuteForRope":
            return self._rotary(op, targets)
        if kind == "ErnieFuseAndSplitTextVisionExperts":
            return Op("share", op.stack_dim, op.concat_dim)
        raise UnsupportedConversion(
            key, kind, self.family, "this version of ckptgate does not know the operation"
        )

    def _rotary(self, op: Any, targets: list[str]) -> Op:
        config = getattr(self._config, op.subconfig_key or "", self._config)
        heads = getattr(config, "num_attention_heads", 1)
        only = None
        if op.permute_layer_names is not None:
            only = tuple(
                i for i, t in enumerate(targets) if any(n in t for n in op.permute_layer_names)
            )
        return Op("unrotary" if op.inverse else "rotary", 0, sizes=(heads,), only=only)


def _targets(key: str, converter: Any) -> list[str]:
    """Return the full names of a converter's results, as the loader expands them: prefix and suffix
    of the first.
    """
    first, *others = converter.target_patterns
    if not others:
        return [key]
    prefix, match, suffix = key.partition(first)
    if not match:  # a capture group of the pattern was filled in
        return [key, *others]
    return [f"{prefix}{target}{suffix}" for target in (first, *others)]
