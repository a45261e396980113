# SPDX-License-Identifier: Apache-2.0
"""Experts whose stored bytes are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from verifier.checkpoint import Tensor
from verifier.rules.context import Context
from verifier.schemes import FLOATS, Module, expert_key

_BEGINNING = 4096
_MAGNITUDE = {"U8": 0x77, "F8_E4M3": 0x7F}


def duplicated(ctx: Context) -> Mapping[str, tuple[str, bool]]:
    """Return the routed experts' projections whose weight and scales equal an earlier one's: that
    one's name, and whether both say little (all zero, or one number up to its sign).
    """
    return ctx.cached("duplicated experts", lambda: _duplicated(ctx))


def expert_weights(ctx: Context) -> list[Module]:
    """Return the routed experts' projections."""
    return [
        m
        for m in ctx.candidate.modules.values()
        if m.weight is not None and expert_key(m.name) and len(m.weight.shape) == 2
    ]


def _duplicated(ctx: Context) -> dict[str, tuple[str, bool]]:
    # Equal weights have equal scales, which are a ninth of the bytes, and equal scales begin alike:
    # nearly all experts are told apart by one small read, and no code is read unless all scales are
    # equal.
    modules = [
        m
        for m in expert_weights(ctx)
        if m.weight is not None and (m.quantized or m.weight.dtype in FLOATS)
    ]
    alike = _alike(modules, lambda m, w: (w.dtype, w.shape, _beginning(ctx, m.scale or w)))
    alike = [
        same
        for group in alike
        for same in _alike(group, lambda m, w: ctx.payload.digest(m.scale or w))
    ]
    alike = [same for group in alike for same in _alike(group, lambda _, w: ctx.payload.digest(w))]
    result = {m.name: first.name for first, *others in alike for m in others}
    poor = {
        first: _says_little(ctx, ctx.candidate.modules[first]) for first in set(result.values())
    }
    return {name: (first, poor[first]) for name, first in result.items()}


def _alike(
    modules: Iterable[Module], key: Callable[[Module, Tensor], object]
) -> list[list[Module]]:
    """Return the modules that share a key with another one, together and in order."""
    groups: dict[object, list[Module]] = {}
    for module in modules:
        if module.weight is not None:
            groups.setdefault(key(module, module.weight), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def _beginning(ctx: Context, tensor: Tensor) -> bytes:
    if tensor.nbytes <= _BEGINNING:
        return ctx.payload.bytes_of(tensor).tobytes()  # read once for all rules
    return next(piece.tobytes() for _, piece in ctx.checkpoint.pieces(tensor, _BEGINNING))


def _says_little(ctx: Context, module: Module) -> bool:
    """Whether a weight is one number up to its sign: all zero, or +-c, which two experts may share
    without any bug.
    """
    weight = module.weight
    if weight is None:
        return True
    flat = ctx.payload.bytes_of(weight)
    if weight.dtype in _MAGNITUDE:
        seen = np.unique(flat & _MAGNITUDE[weight.dtype])
        return (
            len(np.unique(np.concatenate([seen & 15, seen >> 4]) if weight.dtype == "U8" else seen))
            < 2
        )
    size = weight.nbytes // max(1, weight.elements)
    values = flat.view({2: np.uint16, 4: np.uint32}[size])
    top = values.dtype.type(1 << (8 * size - 1))
    return bool(((values | top) == (values[0] | top)).all())
