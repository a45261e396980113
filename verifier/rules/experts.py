# SPDX-License-Identifier: Apache-2.0
"""Experts whose stored bytes are equal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from verifier.rules.context import Context
from verifier.schemes import FLOATS, Module, expert_key

_MAGNITUDE = {"U8": 0x77, "F8_E4M3": 0x7F}


def duplicated(ctx: Context) -> Mapping[str, tuple[str, bool]]:
    """Return the routed experts' projections whose weight and scales equal an earlier one's: that one's name, and whether
    both say little (all zero, or one number up to its sign).
    """
    return ctx.once("duplicated experts", lambda: _duplicated(ctx))


def expert_weights(ctx: Context) -> list[Module]:
    """Return the routed experts' projections."""
    return [m for m in ctx.modules.values() if m.weight is not None and expert_key(m.name) and len(m.weight.shape) == 2]


def _duplicated(ctx: Context) -> dict[str, tuple[str, bool]]:
    # Equal weights have equal scales, which are a ninth of the bytes: codes are read only where scales are equal.
    likely: dict[tuple[object, ...], list[Module]] = {}
    for module in expert_weights(ctx):
        weight = module.weight
        if weight is None or not (module.quantized or weight.dtype in FLOATS):
            continue
        part = module.scale if module.scale is not None else weight
        likely.setdefault((weight.dtype, weight.shape, ctx.digest(part)), []).append(module)
    result: dict[str, str] = {}
    for modules in likely.values():
        if len(modules) < 2:
            continue
        seen: dict[bytes, str] = {}
        for module in modules:
            if module.weight is None:
                continue
            first = seen.setdefault(ctx.digest(module.weight), module.name)
            if first != module.name:
                result[module.name] = first
    poor = {first: _says_little(ctx, ctx.modules[first]) for first in set(result.values())}
    return {name: (first, poor[first]) for name, first in result.items()}


def _says_little(ctx: Context, module: Module) -> bool:
    """Whether a weight is one number up to its sign: all zero, or +-c, which two experts may share without any bug."""
    weight = module.weight
    if weight is None:
        return True
    flat = ctx.bytes_of(weight)
    if weight.dtype in _MAGNITUDE:
        seen = np.unique(flat & _MAGNITUDE[weight.dtype])
        return len(np.unique(np.concatenate([seen & 15, seen >> 4]) if weight.dtype == "U8" else seen)) < 2
    size = weight.nbytes // max(1, weight.elements)
    values = flat.view({2: np.uint16, 4: np.uint32}[size])
    top = values.dtype.type(1 << (8 * size - 1))
    return bool(((values | top) == (values[0] | top)).all())
