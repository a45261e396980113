# SPDX-License-Identifier: Apache-2.0
"""An implementation of transformers' experts interface that reads what every expert sees.

It computes expert by expert from the interface's own contract (layout flags, ``_apply_gate``, ``act_fn``,
``post_expert_norm``), in the order of the eager loops, so the model's output is that of the eager implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from exporter.calibration.sites import Site

Forward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def reading(sites: Mapping[Any, tuple[Site, Site]]) -> Forward:
    """Return an experts function that updates the sites of each experts module in ``sites``: gate and up, down."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        outer, inner = sites.get(module, (None, None))
        rows = hidden_states.shape[0]
        count = module.down_proj.shape[0]
        # Position first, as the eager loops order an expert's rows. A router may name an expert beyond the last: no one.
        chosen = top_k_index.t().reshape(-1).clamp(max=count)
        order = torch.argsort(chosen, stable=True)
        sizes = torch.bincount(chosen, minlength=count + 1)[:count].tolist()
        result = torch.zeros_like(hidden_states)
        if outer is not None and inner is not None:
            outer.called = inner.called = True
        start = 0
        for expert, size in enumerate(sizes):
            if not size:
                continue
            slots = order[start : start + size]
            start += size
            token, position = slots % rows, slots // rows
            given = hidden_states[token]
            between = _first(module, given, expert)
            if outer is not None and inner is not None:
                outer.update(expert, given)
                inner.update(expert, between)
            made = _project(module, between, "down_proj", expert)
            if getattr(module, "has_post_expert_norm", False):
                made = module.post_expert_norm(made)
            made = made * top_k_weights[token, position, None]
            result.index_add_(0, token, made.to(result.dtype))
        return result

    return forward


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
