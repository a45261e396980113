# SPDX-License-Identifier: Apache-2.0
"""Read what goes into the KV cache: keys after rotary embedding and normalization, and the values
that attention reads.

FP8 KV scales apply to what an engine stores. ModelOpt reads the same tensors (its
``k_bmm_quantizer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers

from exporter.calibration.sites import Site

KvState = tuple[int, Literal["k", "v"]]
"""A layer, by the number under which its attention stores states in the cache; keys or values."""


class ReadingCache(transformers.DynamicCache):
    """A cache for one forward pass that updates a site with each layer's keys and values."""

    def __init__(self, config: Any, sites: Mapping[KvState, Site]) -> None:
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
        """Read the states of a layer, then store them like every cache."""
        for kind, states in (("k", key_states), ("v", value_states)):
            site = self._sites.get((layer_idx, kind))  # type: ignore[arg-type]
            if site is not None:
                site.update(0, states)
        stored: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return stored
