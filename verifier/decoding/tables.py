# SPDX-License-Identifier: Apache-2.0
"""Values of small floats, by tables built from ml_dtypes."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
E4M3_MAX = np.float32(448.0)
E2M1_MAX = np.float32(6.0)


def _table(count: int, dtype: npt.DTypeLike) -> Float32:
    values: Float32 = np.arange(count, dtype=np.uint8).view(dtype).astype(np.float32)
    return values


@cache
def e4m3_table() -> Float32:
    """Return the 256 values of E4M3 (0x7F and 0xFF are NaN)."""
    return _table(256, ml_dtypes.float8_e4m3fn)


@cache
def e8m0_table() -> Float32:
    """Return the 256 powers of two of E8M0, 2^(b-127) (0xFF is NaN)."""
    return _table(256, ml_dtypes.float8_e8m0fnu)


@cache
def e2m1_table() -> Float32:
    """Return the 16 values of E2M1."""
    return _table(16, ml_dtypes.float4_e2m1fn)


@cache
def e2m3_table() -> Float32:
    """Return the 64 values of E2M3, whose sign is bit 5."""
    return _table(64, ml_dtypes.float6_e2m3fn)


@cache
def e3m2_table() -> Float32:
    """Return the 64 values of E3M2, whose sign is bit 5."""
    return _table(64, ml_dtypes.float6_e3m2fn)


@cache
def nibble_pairs() -> Float32:
    """Return [256, 2]: the two E2M1 values of a byte, low nibble (even column) first."""
    codes = np.arange(256)
    return np.stack([e2m1_table()[codes & 15], e2m1_table()[codes >> 4]], axis=1)
