# SPDX-License-Identifier: Apache-2.0
"""An implementation of transformers' experts interface that reads what every expert sees.

`verifier.load.experts` computes expert by expert; the model's output is that of the eager
implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from exporter.calibration.sites import Site
from verifier.load.experts import Given, run_experts

Forward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def reading(sites: Mapping[Any, tuple[Site, Site]]) -> Forward:
    """Return an experts function that updates the sites of each experts module in ``sites``: gate
    and up, down.
    """

    def forward(
        module: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        watched = sites.get(module, (None, None))
        for site in watched:
            if site is not None:
                site.called = True  # also where no token reaches an expert
        first, second = map(_noting, watched)
        return run_experts(module, hidden_states, top_k_index, top_k_weights, first, second)

    return forward


def _noting(site: Site | None) -> Given:
    def given(expert: int, rows: torch.Tensor) -> torch.Tensor:
        if site is not None:
            site.update(expert, rows)
        return rows

    return given
