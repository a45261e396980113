# SPDX-License-Identifier: Apache-2.0
"""Read what goes into the KV cache: keys after rotary embedding and normalization, values as they
are attended to.

FP8 KV scales belong to what an engine stores. ModelOpt reads the same place (its
``k_bmm_quantizer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers

from exporter.calibration.sites import Site

KvSpot = tuple[int, Literal["k", "v"]]
"""A layer by the number that its attention gives the cache, and which of its two states."""


class ReadingCache(transformers.DynamicCache):
    """A cache for one forward pass that updates a site for each layer's keys and values."""

    def __init__(self, config: Any, sites: Mapping[KvSpot, Site]) -> None:
        super().__init__(config=config)
        self._sites = sites

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the states of a layer, then store them as every cache does."""
        for kind, states in (("k", key_states), ("v", value_states)):
            site = self._sites.get((layer_idx, kind))  # type: ignore[arg-type]
            if site is not None:
                site.update(0, states)
        stored: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return stored
