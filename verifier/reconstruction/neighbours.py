# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint next to the base's, and which of them are close to one another: the
norm before a layer, and the layer after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from verifier.checkpoint import Tensor
from verifier.decoding import Float32, widen
from verifier.quantized import QuantizedCheckpoint, config_value
from verifier.reconstruction.cause import CheckpointPair
from verifier.reconstruction.distance import CHUNK_VALUES, floats
from verifier.reconstruction.rows import TILE, value_rows
from verifier.schemes import FLOATS, Module

_LAYER = re.compile(r"(.*?\.\d+)\.")
Pair = tuple[Float32, Float32]
"""Values of the candidate and of the base, of one shape."""


def layer_of(name: str) -> str:
    """Return the prefix of a module's layer, '' for one outside all layers."""
    match = _LAYER.match(name)
    return match[1] if match else ""


class Neighbours:
    """All modules of a checkpoint that the base has too.

    Args:
        pair: the whole candidate and its base.
    """

    def __init__(self, pair: CheckpointPair) -> None:
        self.pair = pair

    @property
    def candidate(self) -> QuantizedCheckpoint:
        """The whole candidate."""
        return self.pair.candidate

    @property
    def base(self) -> QuantizedCheckpoint:
        """Its base."""
        return self.pair.base

    @cached_property
    def weights(self) -> dict[str, list[Module]]:
        """The modules with a two-dimensional weight of the base's shape, by layer."""
        return self._by_layer(dims=True)

    @cached_property
    def norms(self) -> dict[str, list[Module]]:
        """The norms with a weight of the base's shape, by layer."""
        return self._by_layer(dims=False)

    def _by_layer(self, *, dims: bool) -> dict[str, list[Module]]:
        layers: dict[str, list[Module]] = {}
        for module in self.candidate.modules.values():
            origin = self.base.modules.get(module.name)
            if origin is None or module.weight is None or origin.weight is None:
                continue
            if (module.dims is not None) != dims or module.dims != origin.dims:
                continue
            if not dims and not ("norm" in module.name and len(module.weight.shape) == 1):
                continue
            layers.setdefault(layer_of(module.name), []).append(module)
        return layers

    @cached_property
    def containers(self) -> dict[str, list[Module]]:
        """The modules of `weights` by the module that holds them."""
        result: dict[str, list[Module]] = {}
        for modules in self.weights.values():
            for module in modules:
                result.setdefault(module.name.rpartition(".")[0], []).append(module)
        return result

    @cached_property
    def head_size(self) -> int:
        """The rows of one attention head, 0 where the config does not say."""
        config = self.candidate.checkpoint.config
        size = config_value(config, "head_dim")
        heads, hidden = (config_value(config, f) for f in ("num_attention_heads", "hidden_size"))
        return size or (hidden // heads if heads and hidden else 0)

    def values(self, module: Module) -> Pair | None:
        """Return a weight's values, decoded where it is quantized; None where they cannot be, or
        are of different shapes.
        """
        base = self.base.modules.get(module.name)
        own = self.candidate.values(module)
        other = self.base.values(base) if base is not None else None
        if own is None or other is None or own.shape != other.shape:
            return None
        return own, other

    def chunks(self, module: Module) -> Iterator[Pair]:
        """Yield some rows of a weight at a time."""
        rows, width = module.dims or (0, 0)
        step = max(TILE, CHUNK_VALUES // max(1, width) // TILE * TILE)
        origin = self.base.modules[module.name]
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            own = value_rows(self.candidate, module, start, stop)
            other = value_rows(self.base, origin, start, stop)
            if own is not None and other is not None:
                yield floats(own), floats(other)

    def norm_values(self, module: Module) -> Pair | None:
        """Return the values of a norm."""
        own, other = module.weight, self.base.modules[module.name].weight
        return self.tensor_values(own, other) if own is not None and other is not None else None

    def tensor_values(self, own: Tensor, other: Tensor) -> Pair | None:
        """Return the values of an unquantized tensor and of its source in the base."""
        if own.dtype not in FLOATS or other.dtype not in FLOATS or own.shape != other.shape:
            return None
        return (
            widen(self.candidate.checkpoint.array(own)),
            widen(self.base.checkpoint.array(other)),
        )

    def norm_factors(self, layer: str, width: int) -> Iterator[tuple[Module, Float32]]:
        """Yield each norm of a layer whose weight changed, and candidate / base; also of
        1 + weight, as zero-centred norms have it.
        """
        for module in self.norms.get(layer, ()):
            if module.weight is None or module.weight.elements != width:
                continue
            values = self.norm_values(module)
            if values is None or np.array_equal(*values):
                continue
            for shift in (0, 1):
                with np.errstate(all="ignore"):
                    factor = (values[0] + shift) / (values[1] + shift)
                if np.isfinite(factor).all() and (factor != 0).all():
                    yield module, np.asarray(factor, np.float32)
