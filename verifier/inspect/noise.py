# SPDX-License-Identifier: Apache-2.0
"""Signal-to-quantization-noise ratio (SQNR) of the quantized weights, by layer and role and by
layer and expert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from verifier.checkpoint import open_checkpoint
from verifier.errors import ContentError
from verifier.quantized import QuantizedCheckpoint
from verifier.rules.context import Context
from verifier.schemes import Module, expert_key, layer_of, role

E4M3_FLOOR = 0x01
"""The code of 2^-9, the smallest block scale above zero; a block that needs a smaller one loses its
small weights."""
Cell = tuple[str, str]
Cells = dict[Cell, float]
Pair = tuple[float, float]


@dataclass
class Noise:
    """SQNR in dB by (role, layer) and by (layer, expert).

    ``floor`` is the percentage of NVFP4 block scales at the floor, by (layer, expert); ``left_out``
    counts weights that could not be compared.
    """

    roles: Cells = field(default_factory=dict)
    experts: Cells = field(default_factory=dict)
    floor: Cells = field(default_factory=dict)
    weights: int = 0
    left_out: int = 0


def noise(
    candidate: str | os.PathLike[str],
    base: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> Noise:
    """Decode every quantized weight and compare it with the base's.

    SQNR is 10 log10(sum w^2 / sum (w' - w)^2), capped at 200 dB. One weight of each checkpoint
    is in memory at a time.

    Raises:
        ContentError: the base is a different model, or no weight could be compared.
    """
    ctx = Context.of(open_checkpoint(candidate), open_checkpoint(base))
    if ctx.base is None or ctx.expectations.unrelated_base:
        raise ContentError(f"{os.fspath(base)}: {ctx.expectations.unrelated_base or 'no base'}")
    sums = _Sums()
    modules = ctx.candidate.quantized_modules
    for done, module in enumerate(modules):
        if progress is not None:
            progress(done, len(modules))
        energies = _energies(ctx.candidate, ctx.base, module)
        if energies is not None:
            sums.add(module, energies, _scales_at_the_floor(ctx.candidate, module))
    if not sums.weights:
        raise ContentError(
            f"{os.fspath(candidate)}: no quantized weight could be compared with {os.fspath(base)}"
        )
    return Noise(
        _decibels(sums.roles),
        _decibels(sums.experts),
        {cell: 100 * low / of for cell, (low, of) in sums.floor.items() if of},
        sums.weights,
        len(modules) - sums.weights,
    )


def _energies(
    candidate: QuantizedCheckpoint, base: QuantizedCheckpoint, module: Module
) -> Pair | None:
    """Return the energy of a weight and of its error; None if it cannot be compared."""
    source = base.modules.get(module.name)
    original = base.values(source) if source is not None else None
    decoded = candidate.values(module)
    if original is None or decoded is None or original.shape != decoded.shape:
        return None
    return (
        float(np.square(original, dtype=np.float64).sum()),
        float(np.square(decoded - original, dtype=np.float64).sum()),
    )


def _scales_at_the_floor(candidate: QuantizedCheckpoint, module: Module) -> Pair | None:
    """Return how many NVFP4 block scales are at the floor, of how many; None without any."""
    scale = module.parts.get("weight_scale")
    if scale is None or scale.dtype != "F8_E4M3" or not scale.shape:
        return None
    codes = candidate.checkpoint.read(scale)
    return float((codes <= E4M3_FLOOR).sum()), float(codes.size)


@dataclass
class _Sums:
    """Energies by (role, layer) and by (layer, expert), and scales at the floor."""

    roles: dict[Cell, Pair] = field(default_factory=dict)
    experts: dict[Cell, Pair] = field(default_factory=dict)
    floor: dict[Cell, Pair] = field(default_factory=dict)
    weights: int = 0

    def add(self, module: Module, energies: Pair, at_the_floor: Pair | None) -> None:
        """Add one weight."""
        self.weights += 1
        number = layer_of(module.name)
        layer = f"layer {number}" if number is not None else "no layer"
        _add(self.roles, (role(module.name), layer), energies)
        key = expert_key(module.name)
        if key is None:
            return
        _add(self.experts, (layer, f"{key.expert}"), energies)
        if at_the_floor is not None:
            _add(self.floor, (layer, f"{key.expert}"), at_the_floor)


def _add(sums: dict[Cell, Pair], cell: Cell, pair: Pair) -> None:
    first, second = sums.get(cell, (0.0, 0.0))
    sums[cell] = (first + pair[0], second + pair[1])


def _decibels(sums: dict[Cell, Pair]) -> Cells:
    cells = {}
    for cell, (signal, error) in sums.items():
        if math.isfinite(signal) and math.isfinite(error) and signal > 0:
            cells[cell] = min(200.0, 10 * math.log10(signal / error)) if error > 0 else 200.0
    return cells
