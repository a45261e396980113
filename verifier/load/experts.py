# SPDX-License-Identifier: Apache-2.0
"""Routed experts computed one by one, so that what each of them is given can be read or changed.

From the interface's own contract (layout flags, ``_apply_gate``, ``act_fn``, ``post_expert_norm``;
transformers 5, ``integrations/moe.py``), in the order of the eager loops: the model's output is
that of the eager implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Given = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes an expert's number and the rows that one of its projections is given, [rows, in]; returns
what it is to see."""


def run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    first: Given,
    second: Given,
) -> torch.Tensor:
    """Return what an experts module makes of hidden states [tokens, hidden], in their dtype.

    Args:
        module: an experts module of transformers' interface.
        hidden_states: what the layer is given.
        top_k_index: the experts of each token, int64 [tokens, k].
        top_k_weights: their weights, [tokens, k].
        first: called before gate and up of each expert that a token reaches.
        second: called before its down projection.
    """
    rows, count = hidden_states.shape[0], module.down_proj.shape[0]
    # Position first, as the eager loops order an expert's rows. A router may name an expert beyond
    # the last: no one.
    chosen = top_k_index.t().reshape(-1).clamp(max=count)
    order = torch.argsort(chosen, stable=True)
    sizes = torch.bincount(chosen, minlength=count + 1)[:count].tolist()
    result = torch.zeros_like(hidden_states)
    start = 0
    for expert, size in enumerate(sizes):
        if not size:
            continue
        slots = order[start : start + size]
        start += size
        token, position = slots % rows, slots // rows
        between = second(expert, _first(module, first(expert, hidden_states[token]), expert))
        made = _project(module, between, "down_proj", expert)
        if getattr(module, "has_post_expert_norm", False):
            made = module.post_expert_norm(made)
        made = made * top_k_weights[token, position, None]
        result.index_add_(0, token, made.to(result.dtype))
    return result


def implementations(model: Any) -> list[tuple[Any, Any]]:
    """Return every config of the model with its implementation, outer ones first: setting one sets
    those within.
    """
    found: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            found.setdefault(id(config), (config, config._experts_implementation))
    return list(found.values())


def _first(module: Any, given: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the input of the expert's down projection, [rows, intermediate]."""
    if module.has_gate:
        gated: torch.Tensor = module._apply_gate(_project(module, given, "gate_up_proj", expert))
        return gated
    plain: torch.Tensor = module.act_fn(_project(module, given, "up_proj", expert))
    return plain


def _project(module: Any, given: torch.Tensor, leaf: str, expert: int) -> torch.Tensor:
    weight = getattr(module, leaf)[expert]
    bias = getattr(module, f"{leaf}_bias")[expert] if module.has_bias else None
    if module.is_transposed:
        weight = weight.t()
    return torch.nn.functional.linear(given, weight, bias)
