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
    """Return the routed experts' projections whose weight and scales equal an earlier one's: the
    earlier one's name, and whether its weight is trivial (all zero, or one number up to its sign).
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
    # Equal weights have equal scales, which are a ninth of the bytes, and equal scales begin with
    # equal bytes: one small read tells nearly all experts apart, and no weight is read unless the
    # scales are equal.
    digest = ctx.payload.digest
    modules = [m for m in expert_weights(ctx) if m.quantized or _is_float(m)]
    groups = _equal(modules, lambda m, w: (w.dtype, w.shape, _beginning(ctx, m.scale or w)))
    groups = [g for group in groups for g in _equal(group, lambda m, w: digest(m.scale or w))]
    groups = [g for group in groups for g in _equal(group, lambda _, w: digest(w))]
    duplicates: dict[str, tuple[str, bool]] = {}
    for first, *others in groups:
        trivial = _is_trivial(ctx, first)
        duplicates |= {m.name: (first.name, trivial) for m in others}
    return duplicates


def _is_float(module: Module) -> bool:
    return module.weight is not None and module.weight.dtype in FLOATS


def _equal(
    modules: Iterable[Module], key: Callable[[Module, Tensor], object]
) -> list[list[Module]]:
    """Return the modules that share a key with at least one other, grouped and in order."""
    groups: dict[object, list[Module]] = {}
    for module in modules:
        if module.weight is not None:
            groups.setdefault(key(module, module.weight), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def _beginning(ctx: Context, tensor: Tensor) -> bytes:
    if tensor.nbytes <= _BEGINNING:
        return ctx.payload.bytes_of(tensor).tobytes()  # read once for all rules
    return next(piece.tobytes() for _, piece in ctx.checkpoint.pieces(tensor, _BEGINNING))


def _is_trivial(ctx: Context, module: Module) -> bool:
    """Whether a weight is one number up to its sign: all zero, or +-c, which two experts may share
    without any defect.
    """
    weight = module.weight
    if weight is None:
        return True
    data = ctx.payload.bytes_of(weight)
    if weight.dtype in _MAGNITUDE:
        codes = np.unique(data & _MAGNITUDE[weight.dtype])
        if weight.dtype == "U8":
            codes = np.unique(np.concatenate([codes & 15, codes >> 4]))
        return len(codes) < 2
    size = weight.nbytes // max(1, weight.elements)
    values = data.view({2: np.uint16, 4: np.uint32}[size])
    sign = values.dtype.type(1 << (8 * size - 1))
    return bool(((values | sign) == (values[0] | sign)).all())
