# SPDX-License-Identifier: Apache-2.0
"""The loop of `verifier.reconstruction.distance`, compiled by numba (the extra ``fast``).

IEEE float32 throughout, no contraction, and the same order of summation: its sums equal those of
the numpy code bit for bit on x86-64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F32: Any = np.float32
I32: Any = np.int32
U64: Any = np.uint64
_EXPONENT = I32(0x7F800000)
_TILE = 64
"""Blocks per tile: its buffers stay in the first-level cache."""
_CODES = types.Array(types.uint8, 2, "C", readonly=True)
_VALUES = types.Array(types.uint32, 2, "C", readonly=True)
_STEPS = types.Array(types.float32, 1, "C", readonly=True)
_PAIRS = types.Array(types.uint64, 1, "C", readonly=True)
_SUMS = types.Array(types.float32, 2, "C")
_SIGNATURE = types.void(_CODES, _VALUES, _STEPS, types.float32, _PAIRS, types.boolean, _SUMS)


def _compiled(*signature: Any) -> Any:
    def compile_function(function: Any) -> Any:
        try:
            return njit(*signature, nogil=True, cache=True, error_model="numpy")(function)
        except (RuntimeError, OSError):  # no folder for the cache that can be written
            return njit(*signature, nogil=True, error_model="numpy")(function)

    return compile_function


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """Return the bits of a float32 as int32."""

    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), emit


@intrinsic
def _real(context: Any, bits: Any) -> Any:
    """Return the float32 with these bits, int32."""

    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), emit


@_compiled()
def _spread(codes: Any, values: Any, pairs: Any, packed: bool, decoded: Any, base: Any) -> None:
    """Write the pairs of some blocks, decoded codes and base, as float32 in pairs: [block / 2,
    blocks].
    """
    count, half = values.shape
    for b in range(count):
        for i in range(half):
            pair = U64(values[b, i])
            base[i, b] = ((pair << U64(16)) & U64(0xFFFF0000)) | ((pair >> U64(16)) << U64(48))
        if packed:
            for i in range(half):
                decoded[i, b] = pairs[codes[b, i]]
        else:
            for i in range(half):
                decoded[i, b] = pairs[codes[b, 2 * i]] | (pairs[codes[b, 2 * i + 1]] << U64(32))


@_compiled()
def _add_errors(
    decoded: Any, base: Any, step: Any, size: Any, error: Any, along: Any, peak: Any
) -> None:
    """Add up the squares of a row of base values, of their errors, and their products; raise the
    bits of the largest magnitudes.
    """
    for j in range(step.size):
        value = base[j]
        left = decoded[j] * step[j] - value
        size[j] += value * value
        error[j] += left * left
        along[j] += left * value
        peak[j] = max(peak[j], I32(_bits(value) & I32(0x7FFFFFFF)))


@_compiled()
def _max_step(peak: Any, top: Any, packed: bool) -> Any:
    """Return the step of a block under ``max`` calibration: an E4M3 scale times ``top``, or the
    least power of two under which no value is clipped.
    """
    if packed:
        scale = min(max(peak / (F32(6) * top), F32(2**-9)), F32(448))
        power = I32(max(I32(_bits(scale) & _EXPONENT), I32(0x3C800000)))
        grid = _real(power) * F32(1.5 * 2**20)
        return ((scale + grid) - grid) * top
    bits = _bits(peak / F32(448))
    exponent = I32(I32(bits >> I32(23)) + I32((bits & I32(0x7FFFFF)) != 0))
    return _real(I32(I32(min(max(exponent, I32(1)), I32(254))) << I32(23)))


@_compiled()
def _add_rounding(
    base: Any, step: Any, inverse: Any, least: Any, unit: Any, limit: Any, error: Any
) -> None:
    """Add up the squared errors of a row that is rounded to a grid, as `_round` rounds."""
    for j in range(step.size):
        value = base[j] * inverse[j]
        grid = _real(I32(max(I32(_bits(value) & _EXPONENT), least))) * unit
        nearest = min(max((value + grid) - grid, -limit), limit)
        left = (value - nearest) * step[j]
        error[j] += left * left


@_compiled(_SIGNATURE)
def compare(
    codes: Any,
    values: Any,
    step: Any,
    top: Any,
    pairs: Any,
    packed: bool,
    sums: Any,
) -> None:
    """Compare blocks of a weight with those of its base.

    Args:
        codes: uint8 [blocks, block / 2] of two E2M1 codes, or [blocks, block] of E4M3.
        values: the base, BF16 in pairs, uint32 [blocks, block / 2].
        step: the whole scale of each block, float32.
        top: ``max`` calibration's scale of the tensor; 0 for E8M0 scales.
        pairs: by byte, the bits of the float32 of two E2M1 codes or of one of E4M3, uint64 [256].
        packed: whether codes are E2M1.
        sums: float32 [4, 2 x blocks]; written: for the even and the odd values of each block the
            sums of base squared, of error squared, of error times base, and of the squared error
            of ``max``.
    """
    half, count = values.shape[1], values.shape[0]
    wide = 2 * _TILE
    codes_spread, base_spread = np.empty((half, _TILE), U64), np.empty((half, _TILE), U64)
    decoded, base = codes_spread.view(F32), base_spread.view(F32)
    steps, inverse, peak = np.empty(wide, F32), np.empty(wide, F32), np.empty(wide, I32)
    unit = F32(1.5 * 2**22) if packed else F32(1.5 * 2**20)
    least = I32(0x3F800000) if packed else I32(0x3C800000)
    limit = F32(6) if packed else F32(np.inf)
    sums[:, :] = F32(0)
    for start in range(0, count, _TILE):
        n = min(_TILE, count - start)
        stop = start + n
        _spread(codes[start:stop], values[start:stop], pairs, packed, codes_spread, base_spread)
        for b in range(n):
            steps[2 * b] = steps[2 * b + 1] = step[start + b]
        size, error = sums[0, 2 * start : 2 * stop], sums[1, 2 * start : 2 * stop]
        along, best = sums[2, 2 * start : 2 * stop], sums[3, 2 * start : 2 * stop]
        peak[:] = I32(0)
        for i in range(half):
            _add_errors(decoded[i], base[i], steps[: 2 * n], size, error, along, peak)
        for b in range(n):
            largest = _real(I32(max(peak[2 * b], peak[2 * b + 1])))
            by_max = _max_step(largest, top, packed)
            steps[2 * b] = steps[2 * b + 1] = by_max
            inverse[2 * b] = inverse[2 * b + 1] = F32(1) / by_max
        for i in range(half):
            _add_rounding(base[i], steps[: 2 * n], inverse, least, unit, limit, best)
