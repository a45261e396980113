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
from verifier.rules.context import Context
from verifier.schemes import expert_key, layer_of, role

E4M3_FLOOR = 0x01
"""The code of 2^-9, the smallest block scale above zero; a block that needs a smaller one loses its
small weights."""
Cells = dict[tuple[str, str], float]


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
    result = Noise()
    sums: dict[str, dict[tuple[str, str], list[float]]] = {"roles": {}, "experts": {}, "floor": {}}
    modules = ctx.candidate.quantized_modules
    for done, module in enumerate(modules):
        if progress is not None:
            progress(done, len(modules))
        source = ctx.base.modules.get(module.name)
        original = ctx.base.values(source) if source is not None else None
        decoded = ctx.candidate.values(module)
        if original is None or decoded is None or original.shape != decoded.shape:
            result.left_out += 1
            continue
        result.weights += 1
        pair = [
            float(np.square(original, dtype=np.float64).sum()),
            float(np.square(decoded - original, dtype=np.float64).sum()),
        ]
        layer = layer_of(module.name)
        where = f"layer {layer}" if layer is not None else "no layer"
        _add(sums["roles"], (role(module.name), where), pair)
        key = expert_key(module.name)
        if key is None:
            continue
        cell = (where, f"{key.expert}")
        _add(sums["experts"], cell, pair)
        scale = module.parts.get("weight_scale")
        if scale is not None and scale.dtype == "F8_E4M3" and scale.shape:
            codes = ctx.checkpoint.read(scale)
            _add(sums["floor"], cell, [float((codes <= E4M3_FLOOR).sum()), float(codes.size)])
    if not result.weights:
        raise ContentError(
            f"{os.fspath(candidate)}: no quantized weight could be compared with {os.fspath(base)}"
        )
    result.roles, result.experts = _decibels(sums["roles"]), _decibels(sums["experts"])
    result.floor = {k: 100 * low / of for k, (low, of) in sums["floor"].items() if of}
    return result


def _add(
    sums: dict[tuple[str, str], list[float]], cell: tuple[str, str], pair: list[float]
) -> None:
    old = sums.setdefault(cell, [0.0, 0.0])
    old[0], old[1] = old[0] + pair[0], old[1] + pair[1]


def _decibels(sums: dict[tuple[str, str], list[float]]) -> Cells:
    cells = {}
    for cell, (signal, error) in sums.items():
        if math.isfinite(signal) and math.isfinite(error) and signal > 0:
            cells[cell] = min(200.0, 10 * math.log10(signal / error)) if error > 0 else 200.0
    return cells
