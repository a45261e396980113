# SPDX-License-Identifier: Apache-2.0
"""What one pass over a tensor's bytes tells, for all rules that ask about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Bytes

# Infinity and NaN are the numbers whose exponent bits are all set: the bit patterns from the first
# one on, read as signed (positive numbers) and as unsigned (negative ones).
NONFINITE = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F800000)}


@dataclass(slots=True)
class Hits:
    """Places of one kind in a tensor: how many, the first (as an index of bytes or values), and
    what stands there.
    """

    count: int = 0
    first: int = -1
    value: int = 0

    def add(self, start: int, places: npt.NDArray[np.intp], values: npt.NDArray[Any]) -> None:
        """Count ``places``, indices of ``values``, which begins at ``start`` of the tensor; in
        ascending order.
        """
        if places.size:
            if not self.count:
                self.first, self.value = start + int(places[0]), int(values[places[0]])
            self.count += int(places.size)


@dataclass(frozen=True, slots=True)
class TensorScan:
    """One tensor, read once.

    Attributes:
        low: its smallest byte, 1 without any.
        high: its largest byte, 1 without any.
        nonfinite: NaN and infinite values of a BF16, F16 or F32 tensor, ``first`` in values.
        differing: bytes that are not those of the source, ``first`` in bytes; ``value`` is the
            source's byte.
        seen: the byte at the first difference.
    """

    low: int
    high: int
    nonfinite: Hits
    differing: Hits
    seen: int = 0


def survey(
    dtype: str,
    pieces: Iterable[tuple[int, Bytes]],
    theirs: Iterator[tuple[int, Bytes]] | None = None,
) -> TensorScan:
    """Return the facts of a tensor from its (start, bytes), compared with a source's pieces of the
    same sizes.
    """
    low, high = 255, 0
    nonfinite, differing, seen = Hits(), Hits(), 0
    for start, piece in pieces:
        if dtype in NONFINITE:
            _count_nonfinite(dtype, start, piece, nonfinite)
        else:
            low, high = min(low, int(piece.min())), max(high, int(piece.max()))
        if theirs is not None:
            other = next(theirs)[1]
            if not np.array_equal(piece, other):
                places = np.flatnonzero(piece != other)
                if not differing.count:
                    seen = int(piece[places[0]])
                differing.add(start, places, other)
    if low > high:
        low = high = 1
    return TensorScan(low, high, nonfinite, differing, seen)


def _count_nonfinite(dtype: str, start: int, piece: Bytes, found: Hits) -> None:
    size, first = NONFINITE[dtype]
    bits: npt.NDArray[Any] = piece.view(f"u{size}")
    sign = 1 << (8 * size - 1)
    if piece.view(f"i{size}").max() >= first or bits.max() >= sign | first:
        found.add(start // size, np.flatnonzero((bits & first) == first), bits)
