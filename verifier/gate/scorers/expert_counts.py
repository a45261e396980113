# SPDX-License-Identifier: Apache-2.0
"""Which routed experts a corpus reaches: a gate cannot evaluate the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ExpertCounter:
    """Tokens that each expert of each layer was given.

    ``real`` masks positions that are padding: bool [positions], False there.
    """

    def __init__(self) -> None:
        self.real: torch.Tensor | None = None
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, experts: int, index: torch.Tensor) -> None:
        """Count a router's choice.

        Args:
            name: the experts module.
            experts: how many it has.
            index: expert numbers, [positions, chosen]; one beyond the last is ignored.
        """
        index = index.reshape(-1, index.shape[-1])
        if self.real is not None and self.real.numel() == index.shape[0]:
            index = index[self.real.to(index.device)]
        bounded = index.reshape(-1).clamp(0, experts)
        counts = torch.bincount(bounded, minlength=experts + 1)[:experts].cpu()
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def take(self) -> dict[str, list[int]]:
        """Return the counts since the last call, by the name of the experts module."""
        counts = {name: total.tolist() for name, total in self._counts.items()}
        self._counts = {}
        return counts


@contextmanager
def counting(model: Any) -> Iterator[ExpertCounter]:
    """Count what the experts modules of a transformers model are given while the context is open.

    An experts module holds its weights stacked (``down_proj`` [experts, ., .]) and is called with
    the hidden states and the router's choice, as transformers' experts interface has it. Values and
    weights are not touched.
    """
    counter, handles = ExpertCounter(), []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "down_proj", None)
        if getattr(weight, "ndim", 0) == 3:
            hook = _hook(counter, name, weight.shape[0])
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def _hook(counter: ExpertCounter, name: str, experts: int) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args[1:], *kwargs.values()):
            if getattr(value, "ndim", 0) >= 2 and not value.is_floating_point():
                counter.add(name, experts, value)
                return

    return hook
