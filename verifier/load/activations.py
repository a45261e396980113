# SPDX-License-Identifier: Apache-2.0
"""Give a decoded model the activations that its checkpoint declares, so that W4A4 is scored as
W4A4.

A model that `load_model` built has plain weights. While `declared_activations` is open, the input
of each module that the checkpoint quantizes is rounded as its format requires: NVFP4 in blocks of
16 under the module's input_scale, MXFP8 in blocks of 32, FP8 by its input_scale or, without one,
per token; weight-only formats not at all. Routed experts, which transformers stacks, are rounded
expert by expert through its experts interface. The KV cache is not rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError
from verifier.layouts.expert_stacks import expanded, restacked, unstacked
from verifier.load.experts import experts_implementation, is_experts_module, run_experts
from verifier.load.hf import parameter_keys
from verifier.load.rounding import Rounding
from verifier.schemes import (
    FORMATS,
    Declaration,
    Format,
    Module,
    canonical,
    declared_formats,
    expert_key,
    format_of,
    gather,
    layer_of,
    read_declarations,
    role,
)

EXPERTS = "ckptgate"
"""The name of the experts implementation while activations are rounded; score runs record it."""
_MARK = "_ckptgate_roundings"
_GATE_UP, _DOWN = ("gate_up_proj", "up_proj", "gate_proj"), ("down_proj",)
_BY_SCALE = {"fp8": "input_scale", "nvfp4": "input_scale", "nvfp4_ct": "input_global_scale"}
"""The tensor that scales the input, for formats that have one."""
_WEIGHT_ONLY = frozenset({"w4a16_nvfp4", "mxfp4"})
"""Formats whose inputs stay in BF16, whatever is declared."""


@dataclass(slots=True)
class _StackRoundings:
    """How the inputs of each expert of a stack are rounded, by expert."""

    gate_up: dict[int, Rounding] = field(default_factory=dict)
    down: dict[int, Rounding] = field(default_factory=dict)

    def share(self) -> None:
        """Round the inputs of all experts by the largest scale."""
        for by_expert in (self.gate_up, self.down):
            largest = max(by_expert.values(), key=_scale, default=None)
            by_expert.update(dict.fromkeys(by_expert, largest) if largest else {})


def _scale(rounding: Rounding) -> float:
    return rounding.scale


def rounding_of(
    checkpoint: Checkpoint, module: Module, fmt: Format, declaration: Declaration | None
) -> Rounding | None:
    """Return how a quantized module's input is rounded, or None for a weight-only format.

    Raises:
        ContentError: a W4A4 module without an input scale, or with one that is not a positive
            number.
    """
    if fmt.name in _BY_SCALE:
        leaf = _BY_SCALE[fmt.name]
        tensor = module.parts.get(leaf)
        if tensor is not None:
            return _scaled_rounding(checkpoint.array(tensor), tensor.name, fmt)
        if fmt.name == "nvfp4":
            raise ContentError(
                f"{module.name}: declares {fmt.algo} and has no {leaf}; its input cannot be rounded"
            )
        return Rounding("fp8_token") if fmt.name == "fp8" else None
    if fmt.name == "fp8_block":
        dynamic = declaration is not None and declaration.method == "fp8"
        return Rounding("fp8_group") if dynamic else None
    if fmt.name in ("mxfp8", "fp8_per_channel"):
        return Rounding("mxfp8" if fmt.name == "mxfp8" else "fp8_token")
    if fmt.name in _WEIGHT_ONLY or _has_plain_inputs(module, declaration):
        return None
    raise ContentError(f"{module.name}: how {fmt.algo} rounds its input is not supported")


def _has_plain_inputs(module: Module, declaration: Declaration | None) -> bool:
    """Whether a declaration says that the module's input is not quantized."""
    scheme = declaration.declared_for(module.name).scheme if declaration is not None else None
    return scheme is not None and scheme.inputs == "none"


def _scaled_rounding(scale: Any, name: str, fmt: Format) -> Rounding:
    values = np.asarray(scale, np.float32).reshape(-1)
    if values.size != 1 or not np.isfinite(values).all() or values[0] <= 0:
        text = str(values[:4].tolist())[:60]
        raise ContentError(f"{name}: {text} is not an activation scale (one positive number)")
    value = np.float32(1) / values[0] if fmt.name == "nvfp4_ct" else values[0]
    return Rounding("fp8" if fmt.name == "fp8" else "nvfp4", float(value))


def roundings(checkpoint: Checkpoint) -> dict[str, Rounding]:
    """Return the rounding of each module's input by hub name; modules whose input is not rounded
    are left out.

    Raises:
        ContentError: a format that cannot be inferred, an input scale that is missing or not a
            positive number.
    """
    checkpoint = unstacked(checkpoint)
    declaration = expanded(read_declarations(checkpoint).effective, checkpoint)
    by_module = {}
    for module in gather(checkpoint.tensors.values(), declared_formats(declaration)).values():
        if not module.quantized:
            continue
        fmt = FORMATS["mxfp4"] if "blocks" in module.parts else format_of(module, declaration)
        if fmt is None:
            raise ContentError(
                f"{module.name}: its quantization format cannot be inferred; run ckptgate check"
            )
        rounding = rounding_of(checkpoint, module, fmt, declaration)
        if rounding is not None:
            if "pre_quant_scale" in module.parts:
                raise ContentError(
                    f"{module.name}: its input is scaled by a pre_quant_scale before it is "
                    "rounded, which is not modelled; use --activations bf16"
                )
            by_module[module.name] = rounding
    return by_module


@contextmanager
def declared_activations(
    model: Any,
    checkpoint: Checkpoint,
    *,
    shared: bool = False,
    by_module: Mapping[str, Rounding] | None = None,
) -> Iterator[dict[str, int]]:
    """Round the inputs of quantized modules while the context is open; yield how many modules are
    rounded, by kind.

    Every experts module calls the implementation of this module meanwhile, also in a model without
    any rounding: the order of its sums is then the same in base and candidate.

    Args:
        model: what `load_model` made of the checkpoint.
        checkpoint: the checkpoint.
        shared: whether the experts of a layer share the largest input scale, as vLLM loads them.
        by_module: the rounding of each module's input by hub name, where it is not the declared one
            (`roundings`).

    Raises:
        ContentError: a scale that is missing, or a module whose input cannot be reached; it is
            named.
    """
    by_module = roundings(checkpoint) if by_module is None else by_module
    linears, stacks = _by_path(model, checkpoint, by_module)
    if shared:
        for of_stack in stacks.values():
            of_stack.share()
    with ExitStack() as stack:
        for path, rounding in linears.items():
            module = model.get_submodule(path)
            hook = module.register_forward_pre_hook(_hook(rounding), with_kwargs=True)
            stack.callback(hook.remove)
        for path, of_stack in stacks.items():
            module = model.get_submodule(path)
            setattr(module, _MARK, of_stack)
            stack.callback(delattr, module, _MARK)
        if any(is_experts_module(m) for m in model.modules()):
            stack.enter_context(experts_implementation(model, EXPERTS, _forward, stacks))
        yield dict(Counter(r.kind for r in by_module.values()))


def _by_path(
    model: Any, checkpoint: Checkpoint, by_module: Mapping[str, Rounding]
) -> tuple[dict[str, Rounding], dict[str, _StackRoundings]]:
    """Return the roundings of linear layers and of stacks of experts, by their path in the
    model.
    """
    linears: dict[str, Rounding] = {}
    stacks: dict[str, _StackRoundings] = {}
    modules, state = dict(model.named_modules()), set(model.state_dict())
    stacked = stack_names(checkpoint)
    sources = {hub: stacked.get(f"{hub}.weight", f"{hub}.weight") for hub in by_module}
    keys = parameter_keys(model, set(sources.values()))
    for hub, source in sources.items():
        key = keys[source].name
        path, _, leaf = key.rpartition(".")
        module, expert = modules.get(path), expert_key(hub)
        if key not in state and _is_optional(hub, checkpoint):
            continue
        if expert is not None and is_experts_module(module) and leaf in (*_GATE_UP, *_DOWN):
            of_stack = stacks.setdefault(path, _StackRoundings())
            by_expert = of_stack.down if leaf in _DOWN else of_stack.gate_up
            by_expert[expert.expert] = _larger(hub, by_expert.get(expert.expert), by_module[hub])
        elif leaf == "weight" and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            if not isinstance(module, torch.nn.Embedding):
                linears[path] = _larger(hub, linears.get(path), by_module[hub])
        else:
            raise ContentError(
                f"{hub} is {key} of a {type(module).__name__} in transformers: its input cannot be "
                "rounded"
            )
    return linears, stacks


def stack_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return by name of an expert's weight the stack that transformers is given, where the family's
    hub layout has stacks.
    """
    names = {n for n in map(canonical, unstacked(checkpoint).tensors) if n is not None}
    stacks = restacked(names, checkpoint.config)
    return {part: stack.name for stack in stacks for part in stack.parts}


def _is_optional(hub: str, checkpoint: Checkpoint) -> bool:
    """Whether transformers may leave a module out: an MTP head, a tower that text does not pass
    through.
    """
    config = checkpoint.config or {}
    text = config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    beyond = isinstance(layers, int) and (layer_of(hub) or 0) >= layers
    return beyond or role(hub) in ("mtp", "vision", "projector")


def _larger(hub: str, other: Rounding | None, rounding: Rounding) -> Rounding:
    """Return the rounding of projections that read one input in one product: the larger scale, as
    engines take it.

    Raises:
        ContentError: two kinds of rounding.
    """
    if other is not None and other.kind != rounding.kind:
        raise ContentError(
            f"{hub}: its input is {rounding.kind}, that of a projection fused with it {other.kind}"
        )
    return rounding if other is None or rounding.scale >= other.scale else other


def _hook(rounding: Rounding) -> Callable[..., Any]:
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
    of_stack = getattr(module, _MARK, _StackRoundings())

    def before_gate_up(expert: int, x: torch.Tensor) -> torch.Tensor:
        rounding = of_stack.gate_up.get(expert)
        return x if rounding is None else rounding(x)

    def before_down(expert: int, x: torch.Tensor) -> torch.Tensor:
        rounding = of_stack.down.get(expert)
        return x if rounding is None else rounding(x)

    return run_experts(
        module,
        hidden_states,
        top_k_index,
        top_k_weights,
        before_gate_up=before_gate_up,
        before_down=before_down,
    )
