# SPDX-License-Identifier: Apache-2.0
"""Number formats and bit packing, from numpy and ml_dtypes: plain, and slow where that is plainer.

Weights are [out, in]; a block is a run along the input dimension.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tests.formats.files import BF16, E4M3, E8M0, Array

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word, low first, as AutoAWQ packs."""


def bf16(values: npt.ArrayLike) -> Array:
    """Return values rounded to bfloat16."""
    return np.asarray(values, np.float32).astype(BF16)


def f32(values: npt.ArrayLike) -> Array:
    """Return values as float32."""
    return np.asarray(values, np.float32)


def e4m3(values: npt.ArrayLike) -> Array:
    """Return values rounded to E4M3, within [-448, 448]."""
    return np.clip(f32(values), -448, 448).astype(E4M3)


def minifloat(values: Array, kind: type, top: float) -> Array:
    """Return the codes of values in a float of four or six bits, within [-top, top]."""
    return np.clip(f32(values), -top, top).astype(kind).view(np.uint8)


def e2m1(values: Array) -> Array:
    """Return the E2M1 codes of values."""
    return minifloat(values, ml_dtypes.float4_e2m1fn, 6)


def blocks(weight: Array, size: int) -> Array:
    """Return a weight as [out, blocks, size]."""
    return weight.reshape(weight.shape[0], -1, size)


def amax(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Return the largest absolute values along axes, kept as axes of 1."""
    return np.asarray(np.abs(values).max(axis=axis, keepdims=axis is not None))


def power_of_two(largest: Array, top: float) -> Array:
    """Return the exponents of the least powers of two that bring ``largest`` within ``top``."""
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log2(f32(largest) / np.float32(top)))
    return np.clip(exponent, -127, 127).astype(np.int32)


def e8m0_bytes(exponents: Array) -> Array:
    """Return the bytes of powers of two: the exponent plus 127."""
    return (exponents + 127).astype(np.uint8)


def e8m0(exponents: Array) -> Array:
    """Return powers of two as E8M0."""
    return e8m0_bytes(exponents).view(E8M0)


def exp2(exponents: Array) -> Array:
    """Return powers of two as float32."""
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def tiles(weight: Array, size: int) -> Array:
    """Return the largest absolute value of each square tile; the last ones may be smaller."""
    rows, columns = (-(-n // size) for n in weight.shape)
    found = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            part = weight[row * size : (row + 1) * size, column * size : (column + 1) * size]
            found[row, column] = np.abs(part).max()
    return found


def spread(scales: Array, size: int, shape: tuple[int, ...]) -> Array:
    """Return one scale per element from one per square tile."""
    return scales.repeat(size, 0).repeat(size, 1)[: shape[0], : shape[1]]


def integers(quotients: Array, low: int, high: int) -> Array:
    """Return quotients rounded to integers within [low, high]."""
    return np.clip(np.rint(quotients), low, high).astype(np.int64)


def pack(codes: Array, bits: int, word: type) -> Array:
    """Pack codes along the last axis into words, low bits first, as one dense stream.

    ``codes`` are non-negative and below ``2**bits``; the stream is padded with zeros to a word.
    """
    size = np.dtype(word).itemsize * 8
    stream = (codes.astype(np.uint64)[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    stream = stream.reshape(*codes.shape[:-1], -1)
    pad = -stream.shape[-1] % size
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, pad)])
    stream = stream.reshape(*stream.shape[:-1], -1, size)
    words = (stream << np.arange(size, dtype=np.uint64)).sum(axis=-1, dtype=np.uint64)
    unsigned = np.dtype(word).str.replace("i", "u")
    found: Array = words.astype(unsigned).view(word)
    return found


def pack_rows(codes: Array, bits: int, word: type) -> Array:
    """Pack codes along the first axis."""
    return np.ascontiguousarray(pack(codes.T, bits, word).T)


def pack_awq(codes: Array) -> Array:
    """Pack four-bit codes along the last axis into int32 words in AWQ's order."""
    words = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(AWQ_ORDER)]
    return pack(words.reshape(codes.shape), 4, np.int32)


def nibbles(codes: Array) -> Array:
    """Pack four-bit codes along the last axis into bytes, low nibble first."""
    return pack(codes, 4, np.uint8)
