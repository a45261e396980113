# SPDX-License-Identifier: Apache-2.0
"""transformers' experts interface: routed experts computed one by one, so that the input of each
can be read or changed.

Follows the interface's own contract (layout flags, ``_apply_gate``, ``act_fn``,
``post_expert_norm``; transformers 5, ``integrations/moe.py``), in the order of the eager loops: the
model's output is that of the eager implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations import moe

from verifier.errors import ContentError

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What ``use_experts_implementation`` sets on each experts module."""
ExpertsForward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes an experts module, hidden states [tokens, hidden], the experts of each token and their
weights, both [tokens, k]; returns [tokens, hidden]."""
OnInput = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes an expert's number and the input rows of one of its projections, [rows, in]; returns the
rows that the projection computes with."""


def is_experts_module(module: Any) -> bool:
    """Whether a module's class is decorated for transformers' experts interface."""
    return all(hasattr(module, flag) for flag in FLAGS)


@contextmanager
def experts_implementation(
    model: Any, name: str, forward: ExpertsForward, paths: Iterable[str]
) -> Iterator[None]:
    """Have the experts modules of a model call ``forward`` while the context is open.

    The implementation of every config and transformers' registry are as before when it closes, also
    after an exception.

    Args:
        model: a transformers model.
        name: under which the registry holds ``forward`` meanwhile.
        forward: the implementation.
        paths: modules that must call it.

    Raises:
        ContentError: a module of ``paths`` does not follow the experts interface.
    """
    functions: Any = moe.ALL_EXPERTS_FUNCTIONS
    before = functions.get(name)
    configs = _configured_implementations(model)
    # An entry of the instance can be deleted; what its method register() adds cannot.
    functions[name] = forward
    try:
        model.set_experts_implementation(name)
        for path in paths:
            module = model.get_submodule(path)
            if module.config._experts_implementation != name:
                raise ContentError(
                    f"{path} ({type(module).__name__}) does not follow transformers' experts "
                    "interface"
                )
        yield
    finally:
        for config, implementation in configs:
            config._experts_implementation = implementation
        if before is None:
            del functions[name]
        else:
            functions[name] = before


def _configured_implementations(model: Any) -> list[tuple[Any, Any]]:
    """Return every config of the model with its experts implementation.

    Outer configs come first: setting one sets those within.
    """
    configs: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            configs.setdefault(id(config), (config, config._experts_implementation))
    return list(configs.values())


def run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    before_gate_up: OnInput,
    before_down: OnInput,
) -> torch.Tensor:
    """Return the output of an experts module, [tokens, hidden], in the dtype of its input.

    Args:
        module: an experts module of transformers' interface.
        hidden_states: the input, [tokens, hidden].
        top_k_index: the experts of each token, int64 [tokens, k].
        top_k_weights: their weights, [tokens, k].
        before_gate_up: called with the input of gate and up of each expert that a token reaches.
        before_down: called with the input of its down projection.
    """
    rows, count = hidden_states.shape[0], module.down_proj.shape[0]
    # Position first, as the eager loops order an expert's rows. A router may name an expert beyond
    # the last: none.
    assigned = top_k_index.t().reshape(-1).clamp(max=count)
    order = torch.argsort(assigned, stable=True)
    sizes = torch.bincount(assigned, minlength=count + 1)[:count].tolist()
    result = torch.zeros_like(hidden_states)
    start = 0
    for expert, size in enumerate(sizes):
        if not size:
            continue
        slots = order[start : start + size]
        start += size
        token, position = slots % rows, slots // rows
        x = before_gate_up(expert, hidden_states[token])
        x = before_down(expert, _intermediate(module, x, expert))
        x = _project(module, x, "down_proj", expert)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        x = x * top_k_weights[token, position, None]
        result.index_add_(0, token, x.to(result.dtype))
    return result


def _intermediate(module: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the input of the expert's down projection, [rows, intermediate]."""
    if module.has_gate:
        gated: torch.Tensor = module._apply_gate(_project(module, x, "gate_up_proj", expert))
        return gated
    activated: torch.Tensor = module.act_fn(_project(module, x, "up_proj", expert))
    return activated


def _project(module: Any, x: torch.Tensor, leaf: str, expert: int) -> torch.Tensor:
    weight = getattr(module, leaf)[expert]
    bias = getattr(module, f"{leaf}_bias")[expert] if module.has_bias else None
    if module.is_transposed:
        weight = weight.t()
    return torch.nn.functional.linear(x, weight, bias)
