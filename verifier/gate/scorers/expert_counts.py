# SPDX-License-Identifier: Apache-2.0
"""Which routed experts a corpus reaches: what it does not reach, it does not judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Counter:
    """Tokens that each expert of each layer was given; ``real`` masks the positions that are
    padding.
    """

    def __init__(self) -> None:
        self.real: Any = None
        self._counts: dict[str, Any] = {}

    def add(self, name: str, experts: int, index: Any) -> None:
        """Count the experts of a router's choice, [positions, chosen]; an index beyond the last is
        no expert.
        """
        import torch  # noqa: PLC0415

        index = index.reshape(-1, index.shape[-1])
        if self.real is not None and self.real.numel() == index.shape[0]:
            index = index[self.real.to(index.device)]
        # A router may name an expert beyond the last: no one.
        counts = torch.bincount(index.reshape(-1).clamp(0, experts), minlength=experts + 1)[
            :experts
        ].cpu()
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def take(self) -> dict[str, list[int]]:
        """Return the counts since the last call, by the name of the experts module."""
        found = {name: counts.tolist() for name, counts in self._counts.items()}
        self._counts = {}
        return found


@contextmanager
def counting(model: Any) -> Iterator[Counter]:
    """Count what the experts modules of a transformers model are given while the context is open.

    An experts module holds its weights stacked (``down_proj`` [experts, ., .]) and is called with
    the hidden states and the router's choice, as transformers' experts interface has it. Values and
    weights are not touched.
    """
    counter, handles = Counter(), []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "down_proj", None)
        if getattr(weight, "ndim", 0) == 3:
            handles.append(
                module.register_forward_pre_hook(
                    _hook(counter, name, weight.shape[0]), with_kwargs=True
                )
            )
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def _hook(counter: Counter, name: str, experts: int) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args[1:], *kwargs.values()):
            if getattr(value, "ndim", 0) >= 2 and not value.is_floating_point():
                counter.add(name, experts, value)
                return

    return hook
