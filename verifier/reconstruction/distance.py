# SPDX-License-Identifier: Apache-2.0
"""The distance of a decoded weight from its base, next to the distance that plain ``max``
calibration would have.

A weight is read in chunks of rows, so that memory does not grow with it. Formats with blocks of 16
or 32 values take one fast pass: blocks lie side by side along the last axis, where numpy's loops
are long, and two neighbouring codes are decoded by one look-up. Other formats, and values whose
squares float32 cannot hold, take `verifier.decoding` and float64 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
)
from verifier.reconstruction import compiled
from verifier.reconstruction.yardstick import by_max, is_sliced
from verifier.schemes import FORMATS, Format

Parts = dict[str, npt.NDArray[Any]]
CHUNK_VALUES = 1 << 20
"""Values per chunk of rows."""
DEFAULT_BLOCK = 32
"""Values per block where a format has no blocks."""
LANE = 1 << 18
"""Values that the fast pass holds at a time. With fewer, starting numpy's loops takes most of the
time; with more, two processes wait for memory."""
TINY, HUGE = 1e-20, 1e30


@dataclass(slots=True)
class Distance:
    """Sums over the values of a weight.

    Attributes:
        size: base squared.
        error: (decoded - base) squared.
        by_max: (encoded by ``max`` calibration - base) squared.
        along: (decoded - base) x base; divided by ``size``, the common factor of all values minus
            one.
        suspect: whether the error of a block is `beyond` that of ``max``.
    """

    size: float = 0.0
    error: float = 0.0
    by_max: float = 0.0
    along: float = 0.0
    suspect: bool = False

    def add(self, other: Distance) -> None:
        """Add the sums of further rows."""
        self.size += other.size
        self.error += other.error
        self.by_max += other.by_max
        self.along += other.along
        self.suspect = self.suspect or other.suspect


Pass = Callable[[npt.NDArray[Any], npt.NDArray[Any], "Steps", np.float32], Distance]
"""Compares some blocks: codes and base values in pairs, the scales of the blocks, and ``max``
calibration's scale of the tensor."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The scales of some blocks: their bytes, uint8 [blocks], and the whole scale that each byte
    stands for, float32 [256].
    """

    codes: npt.NDArray[np.uint8]
    table: Float32

    def of(self, rows: slice) -> Steps:
        """Return those of some of the blocks."""
        return Steps(self.codes[rows], self.table)


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Some rows of a weight: the stored tensors by leaf, and the base's values as float32 or as the
    bits of BF16 (uint16).
    """

    parts: Parts
    reference: npt.NDArray[Any]


def peak_of(reference: npt.NDArray[Any]) -> float:
    """Return the largest magnitude among a chunk's base values, infinity where one is infinite or
    NaN.
    """
    if reference.dtype != np.uint16:
        top = float(np.abs(reference).max(initial=0.0))
        return top if np.isfinite(top) else np.inf
    positive, negative = int(reference.view(np.int16).max(initial=0)), int(reference.max(initial=0))
    bits = max(positive, negative & 0x7FFF if negative >= 0x8000 else 0)
    return float(floats(np.array([bits], np.uint16))[0]) if bits < 0x7F80 else np.inf


def norm2(values: Float32) -> float:
    """Return the sum of squares in float64."""
    # Not a dot product: that would start BLAS threads next to the others.
    return float(np.square(values, dtype=np.float64).sum())


def along(values: Float32, reference: Float32) -> float:
    """Return the sum of (values - reference) x reference in float64."""
    return float(((values - reference) * reference).sum(dtype=np.float64))


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
    """Return which blocks have an error more than 1.5 times a yardstick's and larger than rounding.

    Args:
        far: squared error of each block.
        near: the yardstick's squared error of each block.
        size: sum of squares of each block.
    """
    if not size.size:
        return np.zeros(size.shape, np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = size.mean(dtype=np.float64)
        floor = np.float32(2**-12) * np.maximum(size, np.float32(mean / 16))
        result: npt.NDArray[np.bool_] = (far > np.float32(2.25) * near) & (far > floor)
    return result


def floats(reference: npt.NDArray[Any]) -> Float32:
    """Return a chunk's base values as float32."""
    if reference.dtype != np.uint16:
        return np.asarray(reference, np.float32)
    values: Float32 = np.left_shift(reference, 16, dtype=np.uint32).view(np.float32)
    return values


def distance(chunks: Iterable[RowChunk], fmt: str | Format, amax: float) -> tuple[Distance, bool]:
    """Return the distance of a weight from its base, and whether ``by_max`` is defined.

    Args:
        chunks: its rows.
        fmt: a format, or a name of `verifier.schemes.FORMATS`.
        amax: the largest magnitude of the base, over all chunks.

    Raises:
        ContentError: the parts do not fit one another.
    """
    total, defined = Distance(), bool(amax > 0 and np.isfinite(amax))
    known = FORMATS[fmt] if isinstance(fmt, str) else fmt
    for chunk in chunks:
        part = _fast(chunk, known, amax) if defined and is_sliced(known) else None
        if part is None:
            part, defined = _slow(chunk, known, amax if defined else 0.0)
        total.add(part)
    return total, defined


def _slow(chunk: RowChunk, fmt: Format, amax: float) -> tuple[Distance, bool]:
    """Return the distance of a chunk in any format; ``amax`` is 0 where ``by_max`` is not asked
    for.
    """
    reference, decoded = floats(chunk.reference), decode(chunk.parts, fmt)
    with np.errstate(over="ignore", invalid="ignore"):
        error = decoded - reference
        part = Distance(norm2(reference), norm2(error), along=along(decoded, reference))
    encoded = by_max(reference, chunk.parts, fmt, amax) if amax else None
    if encoded is None:
        return part, False
    left = encoded - reference
    width = min(fmt.group_size or DEFAULT_BLOCK, DEFAULT_BLOCK)
    part.by_max = norm2(left)
    part.suspect = bool(beyond(*(block_norms2(x, width) for x in (error, left, reference))).any())
    return part, True


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


def _fast(chunk: RowChunk, layout: Format, amax: float) -> Distance | None:
    """Return the distance of a chunk, or None where the fast pass cannot take it."""
    reference = chunk.reference
    block = layout.group_size if layout.block is not None and layout.block[0] == 1 else None
    if block not in (16, 32) or not reference.size or reference.shape[1] % block:
        return None
    if "pre_quant_scale" in chunk.parts:
        return None
    weight, packed = chunk.parts.get("weight", chunk.parts.get("weight_packed")), layout.packed
    shape = (reference.shape[0], reference.shape[1] // (2 if packed else 1))
    if weight is None or weight.shape != shape or not weight.flags.c_contiguous:
        return None
    steps = _block_steps(chunk, block, packed)
    top = np.float32(amax) / np.float32(6 * 448) if packed else np.float32(0)
    if steps is None or (packed and not TINY < top < HUGE):
        return None
    codes = weight.view(np.uint8 if packed else np.uint16).reshape(-1, block // 2)
    pair = np.uint64 if reference.dtype == np.float32 else np.uint32
    values = np.ascontiguousarray(reference).view(pair).reshape(-1, block // 2)
    run = _compiled_pass(block, packed, values)
    run, total = run or _Lanes(block, packed, values.dtype).run, Distance()
    count = LANE // block
    with np.errstate(all="ignore"):
        for i in range(0, len(values), count):
            rows = slice(i, i + count)
            total.add(run(codes[rows], values[rows], steps.of(rows), top))
    if not np.isfinite(total.error) or not np.isfinite(total.by_max):
        return None
    if total.size == total.error == 0:  # also of values whose squares underflow
        magnitude = np.uint8(0x77 if packed else 0x7F)
        zero = peak_of(reference) == 0 and not (weight.view(np.uint8) & magnitude).any()
        return total if zero else None
    return total if TINY < total.size / reference.size < HUGE else None


def _block_steps(chunk: RowChunk, block: int, packed: bool) -> Steps | None:
    """Return the scales of the blocks; None where those that are stored are not one byte per
    block.
    """
    rows, columns = chunk.reference.shape
    scale = chunk.parts.get("weight_scale", chunk.parts.get("weight_scale_inv"))
    if scale is None or scale.shape != (rows, columns // block) or scale.dtype.itemsize != 1:
        return None
    codes = scale.view(np.uint8).reshape(-1)
    if not packed:
        return Steps(codes, e8m0_table())
    scale_2 = chunk.parts.get("weight_scale_2", chunk.parts.get("weight_global_scale"))
    if scale_2 is None or scale_2.size != 1 or scale_2.dtype != np.float32:
        return None
    factor = scale_2.reshape(())
    with np.errstate(all="ignore"):
        divided = "weight_scale_2" not in chunk.parts
        table = e4m3_table() / factor if divided else e4m3_table() * factor
    return Steps(codes, np.asarray(table, np.float32))


class _Lanes:
    """Buffers of the fast pass: arrays of [block / 2, 2 x blocks], a block's values in pairs down
    the first axis.
    """

    def __init__(self, block: int, packed: bool, pair: npt.DTypeLike) -> None:
        self.packed, self.half = packed, block // 2
        count = self.half * (LANE // block)
        self.index = np.empty(count, np.intp)
        self.pairs = np.empty(count, pair)
        self.decoded, self.base, self.grid = (np.empty(2 * count, np.float32) for _ in range(3))

    def run(
        self, codes: npt.NDArray[Any], values: npt.NDArray[Any], steps: Steps, top: np.float32
    ) -> Distance:
        """Return the distance of some blocks: codes and values [blocks, block / 2] in pairs."""
        n, half = len(values), self.half
        index = self.index[: half * n].reshape(half, n)
        pairs = self.pairs[: half * n].reshape(half, n)
        decoded, base, grid = (
            b[: 2 * half * n].reshape(half, 2 * n) for b in (self.decoded, self.base, self.grid)
        )
        index[...] = codes.T
        np.take(_code_pairs(self.packed), index, out=decoded.view(np.uint64), mode="clip")
        pairs[...] = values.T
        if pairs.dtype == np.uint32:
            np.left_shift(pairs.view(np.uint16), 16, out=base.view(np.uint32), dtype=np.uint32)
        else:
            base[...] = pairs.view(np.float32)
        decoded *= np.repeat(steps.table[steps.codes], 2)
        decoded -= base
        size, error = _columns(base, base), _columns(decoded, decoded)
        along = _columns(decoded, base)
        peak = self._peak(pairs, base)
        max_step = self._max_step(peak, top)
        wide = np.repeat(max_step, 2)
        base *= 1 / wide
        _round(base, decoded, grid, *((1, 1.0) if self.packed else (3, 2.0**-6)))
        if self.packed and float((peak / max_step).max()) > 6.9:
            # A block scale that was rounded down below 2^-6.
            np.clip(decoded, -6, 6, out=decoded)
        base -= decoded
        base *= wide
        return _summed(size, error, along, _columns(base, base))

    def _peak(self, pairs: npt.NDArray[Any], base: Float32) -> Float32:
        """Return the largest magnitude of each block; overwrites the pairs."""
        if pairs.dtype == np.uint32:
            bits = pairs.view(np.uint16)
            bits &= 0x7FFF
            top = floats(bits.max(axis=0))
        else:
            top = np.maximum(base.max(axis=0), -base.min(axis=0))
        return np.maximum(top[0::2], top[1::2])

    def _max_step(self, peak: Float32, top: np.float32) -> Float32:
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

    Adding and subtracting 1.5 x 2^23 units rounds to whole units, ties to even.
    """
    power = grid.view(np.uint32)
    np.bitwise_and(values.view(np.uint32), np.uint32(0x7F800000), out=power)
    np.maximum(power, np.float32(least).view(np.uint32), out=power)
    grid *= np.float32(1.5 * 2 ** (23 - bits))
    np.add(values, grid, out=out)
    out -= grid


def _columns(values: Float32, others: Float32) -> Float32:
    """Return the sum of products of each column of lanes of [block / 2, 2 x blocks]."""
    sums: Float32 = np.einsum("ij,ij->j", values, others, optimize=False)
    return sums


def _summed(size: Float32, error: Float32, along: Float32, best: Float32) -> Distance:
    """Return the distance of some blocks from the sums of their even and of their odd values,
    [2 x blocks].
    """
    sizes, errors, bests = (x[0::2] + x[1::2] for x in (size, error, best))
    return Distance(
        size=_total(sizes),
        error=_total(errors),
        by_max=_total(bests),
        along=_total(along),
        suspect=bool(beyond(errors, bests, sizes).any()),
    )


def _total(values: Float32) -> float:
    return float(values.sum(dtype=np.float64))


def _compiled_pass(block: int, packed: bool, values: npt.NDArray[Any]) -> Pass | None:
    """Return the compiled form of `_Lanes.run`, None where there is none for these values."""
    compare = compiled.compare()
    if compare is None or values.dtype != np.uint32 or not values.flags.aligned:
        return None
    pairs = _code_pairs(True) if packed else e4m3_table().view(np.uint32).astype(np.uint64)
    buffer, totals = np.empty(8 * (LANE // block), np.float32), np.empty(4)

    def run(
        codes: npt.NDArray[Any], values: npt.NDArray[Any], steps: Steps, top: np.float32
    ) -> Distance:
        sums = buffer[: 8 * len(values)].reshape(4, -1)
        suspect = compare(
            codes.view(np.uint8),
            values,
            steps.codes,
            steps.table,
            top,
            pairs,
            packed,
            sums,
            totals,
        )
        size, error, along, best = totals.tolist()
        return Distance(size, error, best, along, suspect)

    return run
