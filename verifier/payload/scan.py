# SPDX-License-Identifier: Apache-2.0
"""One pass over a tensor's bytes, which answers what several rules ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Bytes
from verifier.schemes import SCALE_BITS, scale_flaws

# Infinity and NaN are the numbers whose exponent bits are all set: the bit patterns from the first
# one on, read as signed (positive numbers) and as unsigned (negative ones).
NONFINITE = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F800000)}


@dataclass(slots=True)
class Hits:
    """Positions of one kind in a tensor: how many, the first (an index of bytes or of values), and
    a value there.
    """

    count: int = 0
    first: int = -1
    value: int = 0

    def add(self, start: int, indices: npt.NDArray[np.intp], values: npt.NDArray[Any]) -> None:
        """Count ``indices`` of ``values``, in ascending order; ``values`` begins at ``start`` of
        the tensor.
        """
        if indices.size:
            if not self.count:
                self.first, self.value = start + int(indices[0]), int(values[indices[0]])
            self.count += int(indices.size)


@dataclass(frozen=True, slots=True)
class TensorScan:
    """The result of one pass over a tensor.

    Attributes:
        low: the smallest byte, 1 for an empty tensor.
        high: the largest byte, 1 for an empty tensor.
        nonfinite: NaN and infinite values of a BF16, F16 or F32 tensor; ``first`` is an index of
            values.
        differing: bytes that differ from the source's; ``first`` is an index of bytes and ``value``
            the source's byte.
        observed: the tensor's own byte at the first difference.
    """

    low: int
    high: int
    nonfinite: Hits
    differing: Hits
    observed: int = 0


def scan(
    dtype: str,
    pieces: Iterable[tuple[int, Bytes]],
    source: Iterator[tuple[int, Bytes]] | None = None,
) -> TensorScan:
    """Scan a tensor.

    Args:
        dtype: as in the safetensors header.
        pieces: its (start, bytes), in order.
        source: those of the tensor to compare with, in pieces of the same sizes.
    """
    low, high = 255, 0
    nonfinite, differing, observed = Hits(), Hits(), 0
    for start, piece in pieces:
        if dtype in NONFINITE:
            _count_nonfinite(dtype, start, piece, nonfinite)
        else:
            low, high = min(low, int(piece.min())), max(high, int(piece.max()))
        if source is not None:
            other = next(source)[1]
            if not np.array_equal(piece, other):
                indices = np.flatnonzero(piece != other)
                if not differing.count:
                    observed = int(piece[indices[0]])
                differing.add(start, indices, other)
    if low > high:
        low = high = 1
    return TensorScan(low, high, nonfinite, differing, observed)


@dataclass(frozen=True, slots=True)
class FlawHits:
    """The values of a scale tensor that readers cannot use; positions are indices of values, and
    ``value`` is a bit pattern.

    ``huge`` is a flaw of a factor, ``tiny`` of a divisor.
    """

    zero: Hits
    nan: Hits
    infinite: Hits
    negative: Hits
    huge: Hits
    tiny: Hits


def flaws(dtype: str, pieces: Iterable[tuple[int, Bytes]]) -> FlawHits:
    """Count the flaws of a scale tensor.

    Args:
        dtype: of its values, a key of `SCALE_BITS`.
        pieces: its (start, bytes), in order.
    """
    width = SCALE_BITS[dtype].width
    found = FlawHits(*(Hits() for _ in range(6)))
    for start, piece in pieces:
        bits = piece.view(f"u{width}")
        masks = scale_flaws(piece, dtype)
        if masks.any or masks.tiny.any():
            for name in ("zero", "nan", "infinite", "negative", "huge", "tiny"):
                indices = np.flatnonzero(getattr(masks, name))
                getattr(found, name).add(start // width, indices, bits)
    return found


def _count_nonfinite(dtype: str, start: int, piece: Bytes, hits: Hits) -> None:
    size, first = NONFINITE[dtype]
    bits: npt.NDArray[Any] = piece.view(f"u{size}")
    sign = 1 << (8 * size - 1)
    if piece.view(f"i{size}").max() >= first or bits.max() >= sign | first:
        hits.add(start // size, np.flatnonzero((bits & first) == first), bits)
