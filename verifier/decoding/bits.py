# SPDX-License-Identifier: Apache-2.0
"""Codes out of packed bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verifier.errors import ContentError

Codes = npt.NDArray[np.uint8]


def unpacked(packed: Codes, bits: int, count: int) -> Codes:
    """Return ``count`` codes of a little-endian bit stream along the last axis.

    Args:
        packed: bytes, contiguous; of words, in the order of their bytes from low to high.
        bits: the width of a code, 1 to 8.
        count: the number of codes in a row, at most ``8 * bytes / bits``.

    Raises:
        ContentError: a row has fewer codes.
    """
    if count * bits > 8 * packed.shape[-1]:
        raise ContentError(f"{packed.shape[-1]} bytes do not hold {count} codes of {bits} bits")
    if bits == 8:
        return packed[..., :count]
    if 8 % bits == 0:
        steps = [
            (packed >> np.uint8(shift)) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)
        ]
        codes = np.stack(steps, axis=-1)
        return codes.reshape(*packed.shape[:-1], -1)[..., :count]
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * bits]
    grouped = stream.reshape(*packed.shape[:-1], count, bits)
    result = np.zeros(grouped.shape[:-1], np.uint8)
    for place in range(bits):
        result |= grouped[..., place] << np.uint8(place)
    return result
