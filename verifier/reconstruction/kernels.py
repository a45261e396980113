# SPDX-License-Identifier: Apache-2.0
"""The loop of `verifier.reconstruction.distance`, compiled by numba (the extra ``fast``).

IEEE float32 throughout, no contraction, and the same order of summation: the sums of a block equal
those of the numpy code bit for bit on x86-64. Sums over blocks are float64 in both, and differ in
the order of summation.
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
_SCALES = types.Array(types.uint8, 1, "C", readonly=True)
_TABLE = types.Array(types.float32, 1, "C", readonly=True)
_PAIRS = types.Array(types.uint64, 1, "C", readonly=True)
_SUMS = types.Array(types.float32, 2, "C")
_TOTALS = types.Array(types.float64, 1, "C")
_SIGNATURE = types.boolean(
    _CODES, _VALUES, _SCALES, _TABLE, types.float32, _PAIRS, types.boolean, _SUMS, _TOTALS
)


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
    for i in range(half):
        for b in range(count):
            pair = U64(values[b, i])
            base[i, b] = ((pair << U64(16)) & U64(0xFFFF0000)) | ((pair >> U64(16)) << U64(48))
        if packed:
            for b in range(count):
                decoded[i, b] = pairs[codes[b, i]]
        else:
            for b in range(count):
                decoded[i, b] = pairs[codes[b, 2 * i]] | (pairs[codes[b, 2 * i + 1]] << U64(32))


# LLVM uses vector instructions for a loop over few arrays only: these two are not one.
@_compiled()
def _add_errors(decoded: Any, base: Any, step: Any, error: Any, along: Any) -> None:
    """Add up the squared errors of each column, and their products with the base values."""
    for i in range(base.shape[0]):
        for j in range(step.size):
            value = base[i, j]
            left = decoded[i, j] * step[j] - value
            error[j] += left * left
            along[j] += left * value


@_compiled()
def _add_sizes(base: Any, size: Any, peak: Any) -> None:
    """Add up the squares of each column of base values; raise the bits of the largest
    magnitudes.
    """
    for i in range(base.shape[0]):
        for j in range(size.size):
            value = base[i, j]
            size[j] += value * value
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
    """Add up the squared errors of columns that are rounded to a grid, as `_round` rounds."""
    for i in range(base.shape[0]):
        for j in range(step.size):
            value = base[i, j] * inverse[j]
            grid = _real(I32(max(I32(_bits(value) & _EXPONENT), least))) * unit
            nearest = min(max((value + grid) - grid, -limit), limit)
            left = (value - nearest) * step[j]
            error[j] += left * left


@_compiled()
def _any_beyond(sums: Any, totals: Any) -> bool:
    """Add up the sums of all blocks; return whether the error of one is `distance.beyond` that of
    ``max``.
    """
    size, error, along, best = sums
    count = size.size // 2
    totals[:] = 0.0
    for b in range(count):
        totals[0] += size[2 * b] + size[2 * b + 1]
        totals[1] += error[2 * b] + error[2 * b + 1]
        totals[2] += along[2 * b]
        totals[2] += along[2 * b + 1]
        totals[3] += best[2 * b] + best[2 * b + 1]
    mean = F32(totals[0] / count / 16)
    beyond = 0
    for b in range(count):
        far = error[2 * b] + error[2 * b + 1]
        near = best[2 * b] + best[2 * b + 1]
        floor = F32(2**-12) * max(size[2 * b] + size[2 * b + 1], mean)
        beyond += (far > F32(2.25) * near) & (far > floor)
    return beyond > 0


@_compiled(_SIGNATURE)
def compare(
    codes: Any,
    values: Any,
    scales: Any,
    table: Any,
    top: Any,
    pairs: Any,
    packed: bool,
    sums: Any,
    totals: Any,
) -> bool:
    """Compare blocks of a weight with those of its base; return whether the error of one is
    `distance.beyond` that of ``max``.

    Args:
        codes: uint8 [blocks, block / 2] of two E2M1 codes, or [blocks, block] of E4M3.
        values: the base, BF16 in pairs, uint32 [blocks, block / 2].
        scales: the bytes of the blocks' scales, uint8 [blocks].
        table: the whole scale that each byte stands for, float32 [256].
        top: ``max`` calibration's scale of the tensor; 0 for E8M0 scales.
        pairs: by byte, the bits of the float32 of two E2M1 codes or of one of E4M3, uint64 [256].
        packed: whether codes are E2M1.
        sums: float32 [4, 2 x blocks]; written: for the even and the odd values of each block the
            sums of base squared, of error squared, of error times base, and of the squared error
            of ``max``.
        totals: float64 [4]; written: the four sums over all blocks.
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
            steps[2 * b] = steps[2 * b + 1] = table[scales[start + b]]
        size, error = sums[0, 2 * start : 2 * stop], sums[1, 2 * start : 2 * stop]
        along, best = sums[2, 2 * start : 2 * stop], sums[3, 2 * start : 2 * stop]
        peak[:] = I32(0)
        _add_errors(decoded, base, steps[: 2 * n], error, along)
        _add_sizes(base, size, peak)
        for b in range(n):
            largest = _real(I32(max(peak[2 * b], peak[2 * b + 1])))
            by_max = _max_step(largest, top, packed)
            steps[2 * b] = steps[2 * b + 1] = by_max
            inverse[2 * b] = inverse[2 * b + 1] = F32(1) / by_max
        _add_rounding(base, steps[: 2 * n], inverse, least, unit, limit, best)
    return bool(_any_beyond(sums, totals))
