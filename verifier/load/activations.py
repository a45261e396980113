# SPDX-License-Identifier: Apache-2.0
"""Give a decoded model the activations that its checkpoint declares, so that W4A4 is judged as
W4A4.

A model that `load_model` built has plain weights. While `declared_activations` is open, the input
of each module that the checkpoint quantizes is rounded as its format says: NVFP4 in blocks of 16
below the module's input_scale, MXFP8 in blocks of 32, FP8 by its input_scale or, without one, by
position; weight-only formats not at all. Routed experts, which transformers stacks, are rounded
expert by expert through its experts interface. The KV cache is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError
from verifier.layouts.expert_stacks import expanded, restacked, unstacked
from verifier.load.experts import implementations, run_experts
from verifier.load.rounding import Rounding
from verifier.schemes import (
    FORMATS,
    Declaration,
    Format,
    Module,
    canonical,
    expert_key,
    format_of,
    gather,
    layer_of,
    read_declarations,
    role,
)

EXPERTS = "ckptgate"
_MARK = "_ckptgate_roundings"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_FIRST, _SECOND = ("gate_up_proj", "up_proj", "gate_proj"), ("down_proj",)

Roles = tuple[dict[int, Rounding], dict[int, Rounding]]
"""What the first and the second projection of each expert of a stack is given."""


def rounding_of(
    checkpoint: Checkpoint, module: Module, fmt: Format, declaration: Declaration | None
) -> Rounding | None:
    """Return how a quantized module's input is rounded, or None for a weight-only format.

    Raises:
        ContentError: a W4A4 module without a scale, or with one that no activation can be divided
            by.
    """
    if fmt.name in ("nvfp4", "fp8", "nvfp4_ct"):
        leaf = "input_global_scale" if fmt.name == "nvfp4_ct" else "input_scale"
        tensor = module.parts.get(leaf)
        if tensor is None:
            if fmt.name == "nvfp4":
                raise ContentError(
                    f"{module.name}: declares {fmt.algo} and has no {leaf}; its input cannot be rounded"
                )
            return Rounding("fp8_token") if fmt.name == "fp8" else None
        values = np.asarray(checkpoint.array(tensor), np.float32).reshape(-1)
        if values.size != 1 or not np.isfinite(values).all() or values[0] <= 0:
            raise ContentError(
                f"{tensor.name}: {str(values[:4].tolist())[:60]} is no scale for activations"
            )
        scale = np.float32(1) / values[0] if fmt.name == "nvfp4_ct" else values[0]
        return Rounding("fp8" if fmt.name == "fp8" else "nvfp4", float(scale))
    if fmt.name == "fp8_block":
        return (
            Rounding("fp8_group")
            if declaration is not None and declaration.method == "fp8"
            else None
        )
    return {"mxfp8": Rounding("mxfp8"), "fp8_per_channel": Rounding("fp8_token")}.get(fmt.name)


def roundings(checkpoint: Checkpoint) -> dict[str, Rounding]:
    """Return the rounding of each module's input by hub name; modules whose input is not rounded
    are left out.

    Raises:
        ContentError: a format that cannot be told, a scale that is missing or none.
    """
    checkpoint = unstacked(checkpoint)
    declaration = expanded(read_declarations(checkpoint).effective, checkpoint)
    found = {}
    for module in gather(checkpoint.tensors.values()).values():
        if not module.quantized:
            continue
        fmt = FORMATS["mxfp4"] if "blocks" in module.parts else format_of(module, declaration)
        if fmt is None:
            raise ContentError(
                f"{module.name}: quantized, and its format cannot be told; run check first"
            )
        if (rounding := rounding_of(checkpoint, module, fmt, declaration)) is not None:
            found[module.name] = rounding
    return found


def memory_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the parameter that transformers' loader makes of each hub tensor, or makes it a part
    of.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    return {
        n: rename_source_key(n, renamings, converters, model.base_model_prefix, state)[0]
        for n in names
    }


@contextmanager
def declared_activations(model: Any, checkpoint: Checkpoint) -> Iterator[dict[str, int]]:
    """Round what quantized modules see while the context is open; yield how many modules are
    rounded, by kind.

    Every experts module calls the implementation of this module meanwhile, also in a model without
    any rounding: the order of its sums is then the same in base and candidate.

    Args:
        model: what `load_model` made of the checkpoint.
        checkpoint: the checkpoint.

    Raises:
        ContentError: a scale that is missing, or a module whose input cannot be reached; it is
            named.
    """
    wanted = roundings(checkpoint)
    linears, stacks = _places(model, checkpoint, wanted)
    handles = [m.register_forward_pre_hook(_hook(r), with_kwargs=True) for m, r in linears.values()]
    before = implementations(model)
    try:
        for module, roles in stacks.values():
            setattr(module, _MARK, roles)
        if any(_interface(m) for m in model.modules()):
            from transformers.integrations import moe  # noqa: PLC0415

            functions: Any = moe.ALL_EXPERTS_FUNCTIONS
            functions[EXPERTS] = _forward
            model.set_experts_implementation(EXPERTS)
            for path, (module, _) in stacks.items():
                if module.config._experts_implementation != EXPERTS:
                    raise ContentError(
                        f"{path} ({type(module).__name__}) does not follow transformers' experts interface"
                    )
        yield dict(Counter(r.kind for r in wanted.values()))
    finally:
        for handle in handles:
            handle.remove()
        for config, implementation in before:
            config._experts_implementation = implementation
        for module, _ in stacks.values():
            delattr(module, _MARK)


def _places(
    model: Any, checkpoint: Checkpoint, wanted: Mapping[str, Rounding]
) -> tuple[dict[str, tuple[Any, Rounding]], dict[str, tuple[Any, Roles]]]:
    """Return the linear modules and the stacks of experts that roundings belong to, by their path
    in memory.
    """
    linears: dict[str, tuple[Any, Rounding]] = {}
    stacks: dict[str, tuple[Any, Roles]] = {}
    modules, state = dict(model.named_modules()), set(model.state_dict())
    stacked = _stacked_names(checkpoint)
    sources = {hub: stacked.get(f"{hub}.weight", f"{hub}.weight") for hub in wanted}
    keys = memory_names(model, set(sources.values()))
    for hub, source in sources.items():
        key = keys[source]
        path, _, leaf = key.rpartition(".")
        module, expert = modules.get(path), expert_key(hub)
        if key not in state and _unbuilt(hub, checkpoint):
            continue
        if expert is not None and _interface(module) and leaf in (*_FIRST, *_SECOND):
            _, roles = stacks.setdefault(path, (module, ({}, {})))
            given = roles[leaf in _SECOND]
            given[expert.expert] = _shared(hub, given.get(expert.expert), wanted[hub])
        elif leaf == "weight" and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            if not isinstance(module, torch.nn.Embedding):
                linears[path] = (
                    module,
                    _shared(hub, linears[path][1] if path in linears else None, wanted[hub]),
                )
        else:
            raise ContentError(
                f"{hub} is {key} of a {type(module).__name__} in transformers: its input cannot be rounded"
            )
    return linears, stacks


def _stacked_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the stack that transformers is given for each expert's weight, where the family's hub
    layout has stacks.
    """
    names = {n for n in map(canonical, unstacked(checkpoint).tensors) if n is not None}
    return {
        part: stack
        for stack, (_, parts) in restacked(names, checkpoint.config).items()
        for part in parts
    }


def _unbuilt(hub: str, checkpoint: Checkpoint) -> bool:
    """Whether transformers may leave a module out: an MTP head, a tower that text does not pass
    through.
    """
    config = checkpoint.config or {}
    text = config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    beyond = isinstance(layers, int) and (layer_of(hub) or 0) >= layers
    return beyond or role(hub) in ("mtp", "vision", "projector")


def _shared(hub: str, other: Rounding | None, mine: Rounding) -> Rounding:
    """Return the rounding of projections that read one input in one product: the larger scale, as
    engines take it.
    """
    if other is not None and other.kind != mine.kind:
        raise ContentError(
            f"{hub}: its input is {mine.kind}, that of a projection fused with it {other.kind}"
        )
    return mine if other is None or mine.scale >= other.scale else other


def _interface(module: Any) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS)


def _hook(rounding: Rounding) -> Any:
    def hook(
        _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (rounding(args[0]), *args[1:]), kwargs
        return args, kwargs | {"input": rounding(kwargs["input"])}

    return hook


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute routed experts one by one, their inputs rounded."""
    roles: Roles = getattr(module, _MARK, ({}, {}))
    first, second = (lambda e, x, of=role: of[e](x) if e in of else x for role in roles)
    return run_experts(module, hidden_states, top_k_index, top_k_weights, first, second)
