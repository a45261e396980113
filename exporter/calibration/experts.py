# SPDX-License-Identifier: Apache-2.0
"""An implementation of transformers' experts interface that reads the input of every expert.

`verifier.load.experts` computes expert by expert; the model's output is that of the eager
implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from exporter.calibration.sites import Site
from verifier.load.experts import ExpertsForward, OnInput, run_experts


def reading(sites: Mapping[Any, tuple[Site, Site]]) -> ExpertsForward:
    """Return an experts function that updates the sites of each experts module in ``sites``: that
    of gate and up, and that of down.
    """

    def forward(
        module: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        gate_up, down = sites.get(module, (None, None))
        return run_experts(
            module,
            hidden_states,
            top_k_index,
            top_k_weights,
            before_gate_up=_updating(gate_up),
            before_down=_updating(down),
        )

    return forward


def _updating(site: Site | None) -> OnInput:
    """Return a callback that passes rows through and updates a site with them."""
    if site is not None:
        site.called = True  # also where no token reaches an expert

    def update(expert: int, rows: torch.Tensor) -> torch.Tensor:
        if site is not None:
            site.update(expert, rows)
        return rows

    return update
