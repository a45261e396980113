# SPDX-License-Identifier: Apache-2.0
"""The inner loops of NVFP4, MXFP8 and the FP8 scale sweep, compiled by numba (the extra ``fast``).

IEEE float32 throughout, no contraction, the same order of summation: every byte equals that of the
torch code. Loops over elements read what varies by block from a buffer as wide as themselves, so
that the compiler vectorizes them. All arrays are C-contiguous; several threads may call a kernel at
the same time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from exporter.codecs.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_ONE,
    HEADROOM,
    MX_BLOCK,
    NVFP4_BLOCK,
    SCALE_FLOOR,
)

F32: Any = np.float32
I32: Any = np.int32
U16: Any = np.uint16
U8: Any = np.uint8
_EXPONENT, _MAGNITUDE = I32(0x7F800000), I32(0x7FFFFFFF)
_ONE, _HALF, _SIX = I32(0x3F800000), I32(0x3F000000), I32(0x40C00000)
_E4M3_FLOOR, _E4M3_LEAST, _E4M3_MAX = I32(0x3B000000), I32(0x3C800000), I32(0x43E00000)
"""Bits of 2^-9, the smallest E4M3; of 2^-6, the smallest normal one; of 448."""
_STEP_E2M1, _STEP_E4M3 = I32(22 << 23), I32(20 << 23)
"""Added to the bits of 2^k, gives those of the power of two whose unit in the last place is the
format's step at 2^k."""
_TILE = 2048
"""Elements per tile: its buffers stay in the first-level cache."""


def _compiled(function: Any, **options: Any) -> Any:
    try:
        return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no writable folder for the cache
        return njit(nogil=True, error_model="numpy", **options)(function)


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


@_compiled
def _e4m3(bits: Any) -> Any:
    """Return the E4M3 code of the bits of a magnitude up to 448; ties to even."""
    exponent = I32(max(bits & _EXPONENT, _E4M3_LEAST))
    magic = I32(exponent + _STEP_E4M3)
    steps = I32(_bits(_real(bits) + _real(magic)) - magic)
    return I32(steps + I32(I32(exponent - _E4M3_LEAST) >> I32(20)))


@_compiled
def _e2m1(quotient: Any) -> Any:
    """Return the E2M1 code nearest to a quotient, ties to even; 0 for either zero and for NaN."""
    bits = _bits(quotient + F32(0))
    size = I32(min(bits & _MAGNITUDE, _SIX))
    exponent = I32(max(size & _EXPONENT, _ONE))
    magic = I32(exponent + _STEP_E2M1)
    steps = I32(_bits(_real(size) + _real(magic)) - magic)
    code = I32(
        I32(steps + I32(I32(exponent - _ONE) >> I32(22))) | I32(I32(bits >> I32(28)) & I32(8))
    )
    return I32(0) if (bits & _MAGNITUDE) > _EXPONENT else code


@_compiled
def _pair(bits: Any, i: int, j: int) -> Any:
    return I32(max(bits[i] & _MAGNITUDE, bits[j] & _MAGNITUDE))


@_compiled
def _top(bits: Any, start: int) -> Any:
    """Return the bits of the largest magnitude of 16 values; those of NaN are above all others.

    A tree, written out: a loop is twice as slow.
    """
    r = bits[start : start + 16]
    low = max(max(_pair(r, 0, 8), _pair(r, 4, 12)), max(_pair(r, 1, 9), _pair(r, 5, 13)))
    high = max(max(_pair(r, 2, 10), _pair(r, 6, 14)), max(_pair(r, 3, 11), _pair(r, 7, 15)))
    return I32(max(low, high))


@_compiled
def _e2m1_codes(x: Any, combined: Any, code: Any) -> None:
    """Write the code of every value over the scale of its block of 16, two blocks at a time."""
    for b in range(0, combined.size - 1, 2):
        low, high = combined[b], combined[b + 1]
        values, target = x[b * 16 : b * 16 + 32], code[b * 16 : b * 16 + 32]
        for j in range(32):
            target[j] = U8(_e2m1(values[j] / (low if j < 16 else high)))
    if combined.size % 2:
        for j in range(x.size - 16, x.size):
            code[j] = U8(_e2m1(x[j] / combined[combined.size - 1]))


@_compiled
def _pack(pairs: Any, packed: Any) -> None:
    for j in range(packed.size):
        packed[j] = U8(pairs[j] | (pairs[j] >> U16(4)))


@_compiled
def nvfp4_encode(
    x: Any, bits: Any, scale_2: Any, fixed: bool, table: Any, scales: Any, packed: Any
) -> int:
    """Encode rows; return the bits of the largest magnitude: 0x7F800000 and above for NaN and
    infinity.

    Args:
        x: float32 [rows, in]; ``bits`` is its view as int32.
        bits: see ``x``.
        scale_2: float32 [rows], or [1] for all.
        fixed: whether to encode under the contents of ``scales``.
        table: the values of E4M3 bytes, float32 [256].
        scales: E4M3 bytes, uint8 [rows, in/16]; written unless ``fixed``.
        packed: uint8 [rows, in/2]; written.
    """
    rows, width = x.shape
    largest = I32(0)
    tops, combined = np.empty(_TILE // NVFP4_BLOCK, I32), np.empty(_TILE // NVFP4_BLOCK, F32)
    code = np.empty(_TILE, U8)
    pairs = code.view(U16)
    for i in range(rows):
        shared = scale_2[i if scale_2.size > 1 else 0]
        for left in range(0, width, _TILE):
            right = min(left + _TILE, width)
            raw = bits[i, left:right]
            blocks = scales[i, left // NVFP4_BLOCK : right // NVFP4_BLOCK]
            for b in range(blocks.size):
                tops[b] = _top(raw, b * NVFP4_BLOCK)
            for b in range(blocks.size):
                largest = I32(max(largest, tops[b]))
            if not fixed:
                for b in range(blocks.size):
                    quotient = _real(tops[b]) / (F32(E2M1_MAX) * shared)
                    clamped = I32(min(max(_bits(quotient), _E4M3_FLOOR), _E4M3_MAX))
                    blocks[b] = U8(E4M3_ONE) if quotient == F32(0) else U8(_e4m3(clamped))
            for b in range(blocks.size):
                combined[b] = table[blocks[b]] * shared
            _e2m1_codes(x[i, left:right], combined[: blocks.size], code)
            _pack(pairs, packed[i, left // 2 : right // 2])
    return int(largest)


@_compiled
def _e2m1_value(code: Any) -> Any:
    """Return the value of a code; below 1 the steps are as large as above, so 2v - 1 there."""
    size = I32(code & I32(7))
    value = _real(I32(I32(size << I32(22)) + _HALF))
    if size < I32(2):
        value = value * F32(2) - F32(1)
    return _real(I32(_bits(value) | I32(I32(code & I32(8)) << I32(28))))


@_compiled
def nvfp4_decode(packed: Any, scales: Any, scale_2: Any, table: Any, out: Any) -> None:
    """Write ``(scale * scale_2) * code``; arguments as for `nvfp4_encode`, ``out`` float32 [rows,
    in].
    """
    for i in range(out.shape[0]):
        shared = scale_2[i if scale_2.size > 1 else 0]
        blocks, stored, row = scales[i], packed[i], out[i]
        for b in range(0, blocks.size - 1, 2):
            low, high = table[blocks[b]] * shared, table[blocks[b + 1]] * shared
            pairs, values = stored[b * 8 : b * 8 + 16], row[b * 16 : b * 16 + 32]
            for j in range(16):
                byte, scale = I32(pairs[j]), low if j < 8 else high
                values[2 * j] = _e2m1_value(I32(byte & I32(15))) * scale
                values[2 * j + 1] = _e2m1_value(I32(byte >> I32(4))) * scale
        if blocks.size % 2:
            last = table[blocks[blocks.size - 1]] * shared
            for j in range(stored.size - 8, stored.size):
                byte = I32(stored[j])
                row[2 * j] = _e2m1_value(I32(byte & I32(15))) * last
                row[2 * j + 1] = _e2m1_value(I32(byte >> I32(4))) * last


@_compiled
def mxfp8_encode(x: Any, bits: Any, fixed: bool, inverse: Any, scales: Any, codes: Any) -> int:
    """Encode rows; return the bits of the largest magnitude, as `nvfp4_encode` does.

    Args:
        x: float32 [rows, in]; ``bits`` is its view as int32.
        bits: see ``x``.
        fixed: whether to encode under the contents of ``scales``.
        inverse: 2^(127 - byte), float32 [256].
        scales: E8M0 bytes, uint8 [rows, in/32]; written unless ``fixed``.
        codes: E4M3 bytes, uint8 [rows, in]; written.
    """
    largest = I32(0)
    for i in range(x.shape[0]):
        raw, blocks = bits[i], scales[i]
        for b in range(blocks.size):
            top = I32(max(_top(raw, b * MX_BLOCK), _top(raw, b * MX_BLOCK + 16)))
            largest = I32(max(largest, top))
            if not fixed:
                blocks[b] = U8(min(max(((np.int64(top) + 0x1FFFFF) >> 23) - 8, 0), 254))
            power = inverse[blocks[b]]
            values = x[i, b * MX_BLOCK : (b + 1) * MX_BLOCK]
            target = codes[i, b * MX_BLOCK : (b + 1) * MX_BLOCK]
            for j in range(MX_BLOCK):
                quotient = _bits(values[j] * power)
                size = _e4m3(I32(min(quotient & _MAGNITUDE, _E4M3_MAX)))
                target[j] = U8(I32(size | I32(I32(quotient >> I32(24)) & I32(0x80))))
    return int(largest)


@_compiled
def _e4m3_value(code: Any) -> Any:
    """Return the value of a code; a subnormal counts steps of 2^-9."""
    size = I32(code & I32(0x7F))
    value = _real(I32(I32(size << I32(20)) + I32(120 << 23)))
    if size < I32(8):
        value = F32(size) * F32(SCALE_FLOOR)
    if size == I32(0x7F):
        value = F32(np.nan)
    return _real(I32(_bits(value) | I32(I32(code & I32(0x80)) << I32(24))))


@_compiled
def mxfp8_decode(codes: Any, scales: Any, powers: Any, out: Any) -> None:
    """Write ``code * 2^(scale - 127)``.

    Args:
        codes: E4M3 bytes, uint8 [rows, in].
        scales: E8M0 bytes, uint8 [rows, ceil(in/32)].
        powers: 2^(byte - 127), NaN for 255, float32 [256].
        out: float32 [rows, in]; written. The last block of a row may be incomplete.
    """
    rows, width = out.shape
    for i in range(rows):
        for b in range(width // MX_BLOCK):
            power = powers[scales[i, b]]
            stored = codes[i, b * MX_BLOCK : (b + 1) * MX_BLOCK]
            values = out[i, b * MX_BLOCK : (b + 1) * MX_BLOCK]
            for j in range(MX_BLOCK):
                values[j] = _e4m3_value(I32(stored[j])) * power
        for j in range(width - width % MX_BLOCK, width):
            out[i, j] = _e4m3_value(I32(codes[i, j])) * powers[scales[i, width // MX_BLOCK]]


@_compiled
def _errors(x: Any, low: Any, high: Any, errors: Any) -> None:
    """Write the squared errors of a block under two scales; ``x`` is its 16 magnitudes, twice,
    float32 [32].
    """
    for j in range(32):
        scale = low if j < 16 else high
        size = x[j] / scale
        size = F32(E2M1_MAX) if size > F32(E2M1_MAX) else size
        magic = _real(I32(I32(max(_bits(size) & _EXPONENT, _ONE)) + _STEP_E2M1))
        error = ((size + magic) - magic) * scale - x[j]
        errors[j] = error * error


@_compiled
def _folded(e: Any, i: int) -> Any:
    """Return the sum of 16 errors as `exporter.weights.loss.block_loss` adds them: by halves."""
    even = ((e[i] + e[i + 8]) + (e[i + 4] + e[i + 12])) + (
        (e[i + 2] + e[i + 10]) + (e[i + 6] + e[i + 14])
    )
    odd = ((e[i + 1] + e[i + 9]) + (e[i + 5] + e[i + 13])) + (
        (e[i + 3] + e[i + 11]) + (e[i + 7] + e[i + 15])
    )
    return even + odd


@_compiled
def _first(top: Any, shared: Any, table: Any) -> int:
    """Return the smallest code whose scale clips nothing."""
    quotient = min(top / (F32(E2M1_MAX) * shared), F32(E4M3_MAX))
    first = min(max(int(_e4m3(_bits(quotient))), 1), 126)
    if first < 126 and table[first] < quotient:
        first += 1
    elif first > 1 and table[first - 1] >= quotient:
        first -= 1
    # Readers use the product as the scale, so compare the product.
    if first > 1 and table[first - 1] * shared * F32(E2M1_MAX) >= top:
        first -= 1
    return first


@_compiled
def _bound(top: Any, scale: Any, trust: Any) -> Any:
    """Return ``trust`` times the squared error of the largest value under a scale that clips it."""
    short = max(top - F32(E2M1_MAX) * scale, F32(0))
    return short * short * trust


@_compiled
def _near_one(top: Any, shared: Any) -> Any:
    """Return the power of two by which `exporter.weights.search.near_one` multiplies a block."""
    whole = I32(_bits(shared) >> I32(23)) - I32(127)
    shift = min(I32(127) - I32(_bits(top) >> I32(23)), I32(HEADROOM) - whole)
    return _real(I32(I32(min(max(shift, I32(-126)), I32(126)) + I32(127)) << I32(23)))


@_compiled
def _best_scale(x: Any, top: Any, shared: Any, trust: Any, table: Any, errors: Any) -> int:
    """Return the code of the scale with the least squared error.

    Args:
        x: the magnitudes of a block brought near 1, twice, float32 [32].
        top: their maximum.
        shared: the tensor's scale, brought there with them.
        trust: see `sweep`.
        table: see `sweep`.
        errors: where to work, float32 [32].
    """
    first = _first(top, shared, table)
    best, least = first, F32(np.inf)
    end = min(first + (16 if first <= 8 else 8), 127)
    for code in range(first, end, 2):
        _errors(x, table[code] * shared, table[code + 1] * shared, errors)
        loss = _folded(errors, 0)
        if loss < least or code == first:
            best, least = code, loss
        loss = _folded(errors, 16)
        if loss < least and code + 1 < end:
            best, least = code + 1, loss
    code = first - 1
    while code >= 1:
        low, high = table[code] * shared, table[code - 1] * shared
        if not _bound(top, low, trust) <= least:
            break
        _errors(x, low, high, errors)
        loss = _folded(errors, 0)
        if loss <= least:  # downwards, an equal loss is an earlier first minimum
            best, least = code, loss
        if code == 1 or not _bound(top, high, trust) <= least:
            break
        loss = _folded(errors, 16)
        if loss <= least:
            best, least = code - 1, loss
        code -= 2
    return best


@_compiled
def sweep(x: Any, bits: Any, scale_2: Any, trust: Any, table: Any, scales: Any) -> int:
    """Choose block scales as `exporter.weights.search.block_scales` does with ``sweep``; return the
    bits of the largest magnitude, as `nvfp4_encode` does.

    Args:
        x: float32 [rows, in]; ``bits`` is its view as int32.
        bits: see ``x``.
        scale_2: float32 [rows], or [1] for all.
        trust: factor below 1 of a bound, for the rounding of the losses.
        table: the values of positive E4M3 bytes, float32 [128].
        scales: E4M3 bytes, uint8 [rows, in/16]; written.
    """
    twice, errors = np.empty(32, F32), np.empty(32, F32)
    largest = I32(0)
    for i in range(x.shape[0]):
        shared = scale_2[i if scale_2.size > 1 else 0]
        raw, values = bits[i], x[i]
        for b in range(scales.shape[1]):
            size = _top(raw, b * NVFP4_BLOCK)
            largest = I32(max(largest, size))
            top = _real(size)
            if top / (F32(E2M1_MAX) * shared) == F32(0):
                scales[i, b] = U8(E4M3_ONE)
                continue
            factor = _near_one(top, shared)
            block = values[b * NVFP4_BLOCK : b * NVFP4_BLOCK + NVFP4_BLOCK]
            for j in range(NVFP4_BLOCK):
                magnitude = abs(block[j]) * factor
                twice[j], twice[j + NVFP4_BLOCK] = magnitude, magnitude
            scales[i, b] = U8(
                _best_scale(twice, top * factor, shared * factor, trust, table, errors)
            )
    return int(largest)
