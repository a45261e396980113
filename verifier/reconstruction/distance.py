# SPDX-License-Identifier: Apache-2.0
"""How far a decoded weight is from its base, and how far plain ``max`` calibration in its format
would be.

A weight is walked in pieces of rows, so that memory does not grow with it. For formats of 16 or 32
values a block, in one pass: blocks lie side by side in the last axis, where numpy's loops are long,
and a code is decoded with its neighbour, by one look-up for two. Other formats, and values whose
squares float32 does not hold, take `verifier.decoding` piece by piece and float64 sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.decoding import (
    E4M3_MAX,
    Float32,
    decode,
    e2m1_table,
    e4m3_table,
    e8m0_table,
    max_scales,
    nearest,
)
from verifier.schemes import FORMATS

Parts = dict[str, npt.NDArray[Any]]
PIECE = 1 << 20
"""Values of a piece of rows."""
CHUNK = 32
"""Values that stand for a block where a format has none."""
LANE = 1 << 18
"""Values that the fast pass holds at a time: fewer, and starting numpy's loops is what takes the
time; more, and two processes wait for memory."""
TINY, HUGE = 1e-20, 1e30


@dataclass(slots=True)
class Distance:
    """Sums of squares over a weight: of the base's values, of decoded - base, and of ``max``
    calibrated - base.

    ``along``: the sum of (decoded - base) x base; over ``size``, by how much the values are too
    large as a whole. ``suspect``: a block is off by half as much again as ``max`` leaves there, and
    by more than rounding.
    """

    size: float = 0.0
    error: float = 0.0
    plain: float = 0.0
    along: float = 0.0
    suspect: bool = False

    def add(self, other: Distance) -> None:
        """Take in another piece."""
        self.size += other.size
        self.error += other.error
        self.plain += other.plain
        self.along += other.along
        self.suspect = self.suspect or other.suspect


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a weight: the stored parts, and the base's values as float32 or as the bits of
    BF16 (uint16).
    """

    parts: Parts
    wanted: npt.NDArray[Any]


def peak_of(wanted: npt.NDArray[Any]) -> float:
    """Return the largest magnitude among a piece's base values; infinite where one is infinite or
    NaN.
    """
    if wanted.dtype != np.uint16:
        top = float(np.abs(wanted).max(initial=0.0))
        return top if np.isfinite(top) else np.inf
    positive, negative = int(wanted.view(np.int16).max(initial=0)), int(wanted.max(initial=0))
    bits = max(positive, negative & 0x7FFF if negative >= 0x8000 else 0)
    return float(floats(np.array([bits], np.uint16))[0]) if bits < 0x7F80 else np.inf


def norm2(values: Float32) -> float:
    """Return the sum of squares in float64."""
    # Not a dot product: that would start BLAS threads beside the others.
    return float(np.square(values, dtype=np.float64).sum())


def along(values: Float32, wanted: Float32) -> float:
    """Return the sum of (values - wanted) x wanted in float64."""
    return float(((values - wanted) * wanted).sum(dtype=np.float64))


def block_norms2(values: Float32, width: int) -> npt.NDArray[np.float32]:
    """Return the sum of squares of each block of ``width`` values, [rows, blocks]; the last may be
    short.
    """
    rows, cols = values.shape
    blocks = -(-cols // width)
    if blocks * width != cols:
        values = np.pad(values, ((0, 0), (0, blocks * width - cols)))
    wide = values.reshape(rows, blocks, width)
    result: npt.NDArray[np.float32] = np.einsum("rbw,rbw->rb", wide, wide)
    return result


def beyond(far: Float32, near: Float32, size: Float32) -> npt.NDArray[np.bool_]:
    """Return which blocks are off by half as much again as a yardstick leaves, and by more than
    rounding.

    Args:
        far: squared error of each block.
        near: the yardstick's squared error of each.
        size: sum of squares of each.
    """
    if not size.size:
        return np.zeros(size.shape, np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        floor = np.float32(2**-12) * np.maximum(size, np.float32(float(size.mean()) / 16))
        result: npt.NDArray[np.bool_] = (far > np.float32(2.25) * near) & (far > floor)
    return result


def floats(wanted: npt.NDArray[Any]) -> Float32:
    """Return a piece's base values as float32."""
    if wanted.dtype != np.uint16:
        return np.asarray(wanted, np.float32)
    values: Float32 = np.left_shift(wanted, 16, dtype=np.uint32).view(np.float32)
    return values


def distance(pieces: Iterable[Piece], fmt: str, amax: float) -> tuple[Distance, bool]:
    """Return how far a weight is from its base, and whether ``plain`` is defined.

    Args:
        pieces: its rows, in pieces.
        fmt: a name of `verifier.schemes.FORMATS`.
        amax: the largest magnitude of the base, over all pieces.

    Raises:
        ContentError: the parts do not fit one another.
    """
    total, plain = Distance(), amax > 0 and np.isfinite(amax)
    width = min(FORMATS[fmt].group_size or CHUNK, CHUNK)
    for piece in pieces:
        found = _fast(piece, fmt, amax) if plain else None
        if found is None:
            wanted = floats(piece.wanted)
            got = decode(piece.parts, fmt)
            with np.errstate(over="ignore", invalid="ignore"):
                found = Distance(norm2(wanted), norm2(got - wanted), along=along(got, wanted))
            scales = max_scales(wanted, fmt, amax) if plain else None
            if scales is None:
                plain = False
            else:
                usual = nearest(wanted, scales, fmt)
                found.plain = norm2(usual - wanted)
                blocks = (block_norms2(x, width) for x in (got - wanted, usual - wanted, wanted))
                found.suspect = bool(beyond(*blocks).any())
        total.add(found)
    return total, bool(plain)


@cache
def _code_pairs(packed: bool) -> npt.NDArray[np.uint64]:
    """Return the two float32 values, as one uint64, of each byte of two E2M1 codes or each uint16
    of two E4M3 codes.
    """
    if packed:
        codes = np.arange(256)
        both = np.stack([e2m1_table()[codes & 15], e2m1_table()[codes >> 4]], axis=1)
    else:
        codes = np.arange(65536)
        both = np.stack([e4m3_table()[codes & 255], e4m3_table()[codes >> 8]], axis=1)
    return np.ascontiguousarray(both, np.float32).view(np.uint64).reshape(-1)


def _fast(piece: Piece, fmt: str, amax: float) -> Distance | None:
    """Return the distance of a piece, or None where it is not one for the fast pass."""
    found = FORMATS[fmt]
    block = found.group_size if found.block is not None and found.block[0] == 1 else None
    weight, wanted = piece.parts.get("weight", piece.parts.get("weight_packed")), piece.wanted
    scale = piece.parts.get("weight_scale", piece.parts.get("weight_scale_inv"))
    if (
        block not in (16, 32)
        or weight is None
        or scale is None
        or wanted.shape[1] % block
        or not wanted.size
    ):
        return None
    packed = found.packed
    if (
        weight.shape != (wanted.shape[0], wanted.shape[1] // (2 if packed else 1))
        or not weight.flags.c_contiguous
    ):
        return None
    if scale.shape != (wanted.shape[0], wanted.shape[1] // block) or scale.dtype.itemsize != 1:
        return None
    step: Float32 = (e4m3_table() if packed else e8m0_table())[scale.view(np.uint8).reshape(-1)]
    if packed:
        scale_2 = piece.parts.get("weight_scale_2", piece.parts.get("weight_global_scale"))
        if scale_2 is None or scale_2.size != 1 or scale_2.dtype != np.float32:
            return None
        with np.errstate(all="ignore"):
            divisor = "weight_scale_2" not in piece.parts
            step = np.asarray(
                step / scale_2.reshape(()) if divisor else step * scale_2.reshape(()), np.float32
            )
    top = np.float32(amax) / np.float32(6 * 448) if packed else np.float32(0)
    if packed and not TINY < top < HUGE:
        return None
    codes = weight.view(np.uint8 if packed else np.uint16).reshape(-1, block // 2)
    pair = np.uint64 if wanted.dtype == np.float32 else np.uint32
    values = np.ascontiguousarray(wanted).view(pair).reshape(-1, block // 2)
    lanes, total = _Lanes(block, packed, values.dtype), Distance()
    per = LANE // block
    with np.errstate(all="ignore"):
        for i in range(0, len(values), per):
            total.add(lanes.run(codes[i : i + per], values[i : i + per], step[i : i + per], top))
    mean = total.size / wanted.size
    return (
        total
        if TINY < mean < HUGE and np.isfinite(total.error) and np.isfinite(total.plain)
        else None
    )


class _Lanes:
    """Buffers of the fast pass: arrays of [block / 2, 2 x blocks], a block's values in pairs down
    the first axis.
    """

    def __init__(self, block: int, packed: bool, pair: npt.DTypeLike) -> None:
        self.packed, self.half = packed, block // 2
        count = self.half * (LANE // block)
        self.index = np.empty(count, np.intp)
        self.pairs = np.empty(count, pair)
        self.got, self.base, self.grid = (np.empty(2 * count, np.float32) for _ in range(3))

    def run(
        self, codes: npt.NDArray[Any], values: npt.NDArray[Any], step: Float32, top: np.float32
    ) -> Distance:
        """Return the distance of some blocks: codes and values [blocks, block / 2] in pairs, step
        [blocks].
        """
        n, half = len(values), self.half
        index = self.index[: half * n].reshape(half, n)
        pairs = self.pairs[: half * n].reshape(half, n)
        got, base, grid = (
            b[: 2 * half * n].reshape(half, 2 * n) for b in (self.got, self.base, self.grid)
        )
        index[...] = codes.T
        np.take(_code_pairs(self.packed), index, out=got.view(np.uint64), mode="clip")
        pairs[...] = values.T
        if pairs.dtype == np.uint32:
            np.left_shift(pairs.view(np.uint16), 16, out=base.view(np.uint32), dtype=np.uint32)
        else:
            base[...] = pairs.view(np.float32)
        got *= np.repeat(step, 2)
        got -= base
        sizes, errors = _by_block(base), _by_block(got)
        found = Distance(float(sizes.sum(dtype=np.float64)), float(errors.sum(dtype=np.float64)))
        found.along = float(np.einsum("ij,ij->j", got, base, optimize=False).sum(dtype=np.float64))
        peak = self._peak(pairs, base)
        plain = self._plain(peak, top)
        wide = np.repeat(plain, 2)
        base *= 1 / wide
        _round(base, got, grid, *((1, 1.0) if self.packed else (3, 2.0**-6)))
        if (
            self.packed and float((peak / plain).max()) > 6.9
        ):  # a block scale that was rounded down below 2^-6
            np.clip(got, -6, 6, out=got)
        base -= got
        base *= wide
        best = _by_block(base)
        found.plain = float(best.sum(dtype=np.float64))
        found.suspect = bool(beyond(errors, best, sizes).any())
        return found

    def _peak(self, pairs: npt.NDArray[Any], base: Float32) -> Float32:
        """Return the largest magnitude of each block; overwrites the pairs."""
        if pairs.dtype == np.uint32:
            bits = pairs.view(np.uint16)
            bits &= 0x7FFF
            top = floats(bits.max(axis=0))
        else:
            top = np.maximum(base.max(axis=0), -base.min(axis=0))
        return np.maximum(top[0::2], top[1::2])

    def _plain(self, peak: Float32, top: np.float32) -> Float32:
        """Return the step of each block under ``max`` calibration."""
        if self.packed:
            scale = np.clip(peak / (np.float32(6) * top), np.float32(2**-9), E4M3_MAX)
            rounded = np.empty_like(scale)
            _round(scale, rounded, np.empty_like(scale), 3, 2**-6)
            return np.asarray(rounded * top, np.float32)
        # 2^-127 is E8M0's least; its inverse times a value that small is not needed.
        exponent = np.clip(np.ceil(np.log2(peak / E4M3_MAX)), -126, 127)
        return np.asarray(np.ldexp(np.float32(1), exponent.astype(np.int32)), np.float32)


def _round(values: Float32, out: Float32, grid: Float32, bits: int, least: float) -> None:
    """Round values to ``bits`` bits after the leading one, and below ``least`` to its grid.

    Adding and taking away 1.5 x 2^23 units rounds to whole units, ties to even.
    """
    power = grid.view(np.uint32)
    np.bitwise_and(values.view(np.uint32), np.uint32(0x7F800000), out=power)
    np.maximum(power, np.float32(least).view(np.uint32), out=power)
    grid *= np.float32(1.5 * 2 ** (23 - bits))
    np.add(values, grid, out=out)
    out -= grid


def _by_block(values: Float32) -> Float32:
    """Return the sum of squares of each block, from lanes of [block / 2, 2 x blocks]."""
    columns = np.einsum("ij,ij->j", values, values, optimize=False)
    return np.asarray(columns[0::2] + columns[1::2], np.float32)
