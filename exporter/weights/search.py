# SPDX-License-Identifier: Apache-2.0
"""Choose the E4M3 scale of each NVFP4 block by ``max``, ``mse``, ``sweep`` or ``four_over_six``.

All but ``max`` minimise the block's squared error in float32 (`exporter.weights.loss.block_loss`)
of values whose maximum is brought near 1 first, by a power of two, so that no square over- or
underflows. They take the first minimum in ascending order of their candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from exporter.codecs import fast
from exporter.codecs.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_ONE,
    HEADROOM,
    NVFP4_RANGE,
    SCALE_FLOOR,
)
from exporter.weights.loss import block_loss

Method = Literal["max", "mse", "sweep", "four_over_six"]
METHODS: tuple[Method, ...] = ("max", "mse", "sweep", "four_over_six")
MULTIPLIERS = 39
"""ModelOpt's ``mse`` calibrator: 39 multiples of the block's maximum, evenly from 0.25 to 4. 1.0 is
not among them, so ``max`` would win in 6% of normal blocks: it is tried too."""
FOUR_OVER_SIX_TOP = 256.0
"""Largest block scale that ``four_over_six`` derives from the maximum: times 6/4 it stays below 448
(arXiv 2512.02010)."""
SLACK = 1e-5
"""Relative rounding error of the float32 loss: lower bounds are reduced by it."""


def global_divisor(method: Method) -> float:
    """Return the divisor of amax that gives ``weight_scale_2``."""
    return E2M1_MAX * FOUR_OVER_SIX_TOP if method == "four_over_six" else NVFP4_RANGE


def block_scales(
    magnitude: torch.Tensor, maxima: torch.Tensor, scale_2: torch.Tensor, method: Method
) -> torch.Tensor:
    """Return the E4M3 scale of each block, float8_e4m3fn [rows, blocks]; 1.0 for a zero block.

    Args:
        magnitude: |x|, float32 [rows, blocks, 16].
        maxima: its maximum over each block, float32 [rows, blocks].
        scale_2: ``weight_scale_2`` of each row, float32 [rows, 1] or [1, 1].
        method: one of `METHODS`.
    """
    zero = (maxima / (E2M1_MAX * scale_2)) == 0
    if method == "max":
        chosen = _cast(maxima / (E2M1_MAX * scale_2))
    else:
        chosen = _SEARCHES[method](*near_one(magnitude, maxima, scale_2))
    return chosen.view(torch.uint8).masked_fill_(zero, E4M3_ONE).view(torch.float8_e4m3fn)


def compiled_sweep(
    values: torch.Tensor, scale_2: torch.Tensor, scales: torch.Tensor, kernels: Any
) -> int:
    """Write the block scales that `block_scales` chooses with ``sweep``, and return the bits of the
    largest magnitude (`exporter.codecs.fast.finite`).

    Args:
        values: contiguous float32 [rows, in].
        scale_2: as for `block_scales`.
        scales: contiguous float8_e4m3fn [rows, in/16].
        kernels: the compiled back end.
    """
    array = fast.array(values)
    largest: int = kernels.sweep(
        array,
        array.view("int32"),
        fast.array(scale_2.view(-1)),
        np.float32(1 - SLACK),
        fast.array(_e4m3_values(values.device)),
        fast.array(scales),
    )
    return largest


def _cast(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SCALE_FLOOR, E4M3_MAX).to(torch.float8_e4m3fn)


def near_one(
    magnitude: torch.Tensor, maxima: torch.Tensor, scale_2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, maxima and the tensor's scale of each block [rows, blocks], multiplied by the
    power of two that brings the maximum near 1.

    Codes and scales of blocks depend on quotients only, which a power of two leaves as they are.
    """
    whole = scale_2.expand(maxima.shape)
    shift = torch.minimum(-_exponent(maxima), HEADROOM - _exponent(whole)).clamp_(-126, 126)
    factor = ((shift + 127) << 23).view(torch.float32)
    return magnitude * factor.unsqueeze(-1), maxima * factor, whole * factor


def _exponent(values: torch.Tensor) -> torch.Tensor:
    """Return the binary exponents of positive float32 values, int32; -127 for subnormal ones."""
    return (values.contiguous().view(torch.int32) >> 23) - 127


def _best_of(
    candidates: list[torch.Tensor], magnitude: torch.Tensor, scale_2: torch.Tensor
) -> torch.Tensor:
    best = candidates[0]
    least = block_loss(magnitude, best.float() * scale_2)
    for candidate in candidates[1:]:
        loss = block_loss(magnitude, candidate.float() * scale_2)
        better = loss < least
        least = torch.where(better, loss, least)
        codes = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8))
        best = codes.view(torch.float8_e4m3fn)
    return best


def _mse(magnitude: torch.Tensor, maxima: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Try multiples of the maximum, as ModelOpt's MSE calibrator does, by the rounded scales."""
    plain = maxima / (E2M1_MAX * scale_2)
    steps = [0.25 + i * (4.0 - 0.25) / (MULTIPLIERS - 1) for i in range(MULTIPLIERS)]
    return _best_of([_cast(plain * m) for m in sorted([*steps, 1.0])], magnitude, scale_2)


def _four_over_six(
    magnitude: torch.Tensor, maxima: torch.Tensor, scale_2: torch.Tensor
) -> torch.Tensor:
    """Map the block's maximum to 6 or to 4, whichever has the smaller squared error (Cook et al.,
    arXiv 2512.02010).
    """
    candidates = [_cast(maxima / (top * scale_2)) for top in (E2M1_MAX, 4.0)]
    return _best_of(candidates, magnitude, scale_2)


@lru_cache(maxsize=8)
def _e4m3_values(device: torch.device) -> torch.Tensor:
    return torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def sweep_all(magnitude: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the best of all 126 positive E4M3 scales, trying each: the reference for `_sweep`."""
    magnitude, _, scale_2 = near_one(magnitude, magnitude.amax(-1), scale_2)
    shape = magnitude.shape[:-1]
    table = _e4m3_values(magnitude.device)
    best = torch.ones(shape, dtype=torch.uint8, device=magnitude.device)
    least = torch.full(shape, torch.inf, device=magnitude.device)
    for code in range(1, 127):
        loss = block_loss(magnitude, (table[code] * scale_2).expand(shape))
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, torch.full_like(best, code), best)
    return best.view(torch.float8_e4m3fn)


def _sweep(magnitude: torch.Tensor, maxima: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the best of all 126 positive E4M3 scales, trying about ten.

    From the smallest scale s0 that clips nothing, only one octave upwards can win: within range, 2s
    represents a subset of the values that s represents. (Codes 1 to 8 have no exact half, so two
    octaves are tried there.) Below s0 the error of the largest value alone is (amax - 6s)^2; the
    search ends when that exceeds the best. A test compares the result with `sweep_all`.
    """
    shape = maxima.shape
    x = magnitude.reshape(-1, magnitude.shape[-1])
    top = maxima.reshape(-1)
    whole = scale_2.expand(shape).reshape(-1)
    table = _e4m3_values(x.device)
    # Readers use the product as the scale, so compare the product.
    quotient = (top / (E2M1_MAX * whole)).clamp(max=E4M3_MAX)
    first = torch.searchsorted(table[1:127], quotient).add_(1).clamp_(1, 126)
    lower = (table[first - 1] * whole * E2M1_MAX >= top) & (first > 1)
    first = torch.where(lower, first - 1, first)
    best = first.clone()
    least = block_loss(x, table[best] * whole)
    for step in range(1, 16):
        code = first + step
        active = ((code <= 126) & ((step < 8) | (first <= 8))).nonzero()[:, 0]
        if not active.numel():
            break
        _try(x, whole, table, code, active, best, least, torch.lt)
    code = first - 1
    active = (code >= 1).nonzero()[:, 0]
    while active.numel():
        scale = table[code[active]] * whole[active]
        bound = (top[active] - E2M1_MAX * scale).clamp_(min=0).square_() * (1 - SLACK)
        active = active[bound <= least[active]]
        # Downwards, an equal loss is an earlier first minimum.
        _try(x, whole, table, code, active, best, least, torch.le)
        code = code - 1
        active = active[code[active] >= 1]
    return best.to(torch.uint8).view(torch.float8_e4m3fn).reshape(shape)


def _try(
    x: torch.Tensor,
    whole: torch.Tensor,
    table: torch.Tensor,
    code: torch.Tensor,
    active: torch.Tensor,
    best: torch.Tensor,
    least: torch.Tensor,
    wins: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Try ``code`` for the blocks ``active``; update ``best`` and ``least`` where it wins."""
    tried = code[active]
    loss = block_loss(x[active], table[tried] * whole[active])
    better = wins(loss, least[active])
    winners = active[better]
    best[winners] = tried[better]
    least[winners] = loss[better]


_SEARCHES = {"mse": _mse, "sweep": _sweep, "four_over_six": _four_over_six}
