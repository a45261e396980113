# SPDX-License-Identifier: Apache-2.0
"""A third opinion on NVFP4, MXFP8 and FP8, from numpy and ml_dtypes alone; slow and plain.

Nothing is shared with the exporter (torch, bit tricks) or the verifier (look-up tables). It gives
ModelOpt 0.47's NVFP4 bytes for finite tensors that are not all zero, and for MXFP8 the exact
exponent rule. Every function takes [..., out, in], and returns or takes the parts by their leaf on
disk, one-byte formats as raw uint8.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parts = dict[str, Array]
E4M3 = ml_dtypes.float8_e4m3fn
QUIET: dict[str, Any] = {
    "over": "ignore",
    "under": "ignore",
    "divide": "ignore",
    "invalid": "ignore",
}


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays agree in shape, dtype and bits; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype != np.float32:
        return bool((a == b).all())
    nan = np.isnan(a)
    words = np.ascontiguousarray(a).view(np.uint32) == np.ascontiguousarray(b).view(np.uint32)
    return bool((nan == np.isnan(b)).all() and (words | nan).all())


def e4m3(values: Array) -> Array:
    """Return the E4M3 bytes nearest to float32 ``values`` within [-448, 448], ties to even."""
    return np.clip(values, -448, 448).astype(np.float32).astype(E4M3).view(np.uint8)


def e4m3_values(codes: Array) -> Array:
    """Return the float32 values of E4M3 bytes."""
    return np.ascontiguousarray(codes).view(E4M3).astype(np.float32)


# --- NVFP4


def nvfp4_scale_2(amax: Array | float) -> Array:
    """Return amax / 2688 in float32; 1 for zero (a choice), and never zero for a positive amax."""
    top = np.asarray(amax, np.float32)
    with np.errstate(**QUIET):
        scale = np.asarray(top / np.float32(2688), np.float32)
    scale = np.where((scale == 0) & (top > 0), np.float32(2.0**-149), scale)
    return np.asarray(np.where(top == 0, np.float32(1), scale), np.float32)


def nvfp4_encode(
    values: Array,
    *,
    amax: Array | float | None = None,
    scale_2: Array | float | None = None,
    scale: Array | None = None,
) -> Parts:
    """Encode as NVFP4; ``amax`` or ``scale_2`` are scalars or one a matrix, ``scale`` the E4M3
    bytes themselves.
    """
    x = np.asarray(values).astype(np.float32)
    if scale_2 is None:
        scale_2 = nvfp4_scale_2(np.abs(x).max(axis=(-2, -1), initial=0) if amax is None else amax)
    scale_2 = np.asarray(scale_2, np.float32)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    per_matrix = np.broadcast_to(scale_2, x.shape[:-2])[..., None, None]
    with np.errstate(**QUIET):
        if scale is None:
            wanted = np.abs(blocks).max(axis=-1) / (np.float32(6) * per_matrix)
            scale = e4m3(np.maximum(wanted, np.float32(2**-9)))
            scale[wanted == 0] = 0x38  # 1.0: nothing of such a block survives, whatever the scale
        combined = (e4m3_values(scale) * per_matrix)[..., None]
        code = e2m1(blocks / combined).reshape(x.shape)
    return {
        "weight": code[..., 0::2] | (code[..., 1::2] << 4),
        "weight_scale": scale,
        "weight_scale_2": scale_2,
    }


def e2m1(quotient: Array) -> Array:
    """Return the E2M1 codes nearest to ``quotient`` within [-6, 6], ties to even; -0 and 0/0 are
    code 0.
    """
    size = np.abs(quotient)
    size = np.where(np.isnan(size), np.float32(0), np.minimum(size, np.float32(6)))
    code: Array = size.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return code | np.where(quotient < 0, np.uint8(8), np.uint8(0))


def nvfp4_codes(parts: Parts) -> Array:
    """Return the codes 0 to 15, one a place."""
    packed = parts["weight"]
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(
        *packed.shape[:-1], packed.shape[-1] * 2
    )


def nvfp4_decode(parts: Parts) -> Array:
    """Return ``(scale * scale_2) * code`` in float32."""
    codes = nvfp4_codes(parts)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    per_matrix = np.broadcast_to(np.asarray(parts["weight_scale_2"], np.float32), codes.shape[:-2])[
        ..., None, None
    ]
    with np.errstate(**QUIET):
        combined = e4m3_values(parts["weight_scale"]) * per_matrix
        return values * np.repeat(combined, 16, axis=-1)


# --- MXFP8


def mxfp8_scale(amax: Array) -> Array:
    """Return the E8M0 byte of the least power of two 2^k with amax <= 448 * 2^k, exactly, within
    0..254.

    amax is m * 2^e with m in [1/2, 1), and 448 is 7/8 * 2^9.
    """
    m, e = np.frexp(np.asarray(amax, np.float64))
    k = np.where(m <= 0.875, e - 9, e - 8)
    return np.where(m == 0, 0, np.clip(k + 127, 0, 254)).astype(np.uint8)


def mxfp8_encode(values: Array, *, scale: Array | None = None) -> Parts:
    """Encode as MXFP8; ``scale`` the E8M0 bytes themselves."""
    x = np.asarray(values).astype(np.float32)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    if scale is None:
        scale = mxfp8_scale(np.abs(blocks).max(axis=-1))
    # Exact in float64. In float32 only what lies below 2^-126 is rounded, and there the code is
    # zero anyhow.
    quotient = np.ldexp(blocks.astype(np.float64), 127 - scale.astype(np.int32)[..., None])
    with np.errstate(**QUIET):
        return {"weight": e4m3(quotient).reshape(x.shape), "weight_scale": scale}


def mxfp8_decode(parts: Parts) -> Array:
    """Return ``code * 2^(scale - 127)`` in float32, NaN for the byte 255; the last block may be
    ragged.
    """
    code, scale = parts["weight"], parts["weight_scale"].astype(np.int32)
    with np.errstate(**QUIET):
        power = np.where(scale == 255, np.nan, np.ldexp(1.0, scale - 127))
        wide = np.repeat(power, 32, axis=-1)[..., : code.shape[-1]]
        return (e4m3_values(code).astype(np.float64) * wide).astype(np.float32)


# --- FP8


FP8_LEAF = {
    "fp8": "weight_scale",
    "fp8_per_channel": "weight_scale",
    "fp8_block": "weight_scale_inv",
}


def fp8_amax(values: Array, fmt: str) -> Array:
    """Return max |x| of each matrix, each row, or each 128x128 tile (the last ones may be
    ragged).
    """
    size = np.abs(np.asarray(values).astype(np.float32))
    if fmt == "fp8":
        return size.max(axis=(-2, -1), initial=0)
    if fmt == "fp8_per_channel":
        return size.max(axis=-1, initial=0)
    rows, columns = size.shape[-2:]
    tiles = np.zeros((*size.shape[:-2], -(-rows // 128), -(-columns // 128)), np.float32)
    for i in range(tiles.shape[-2]):
        for j in range(tiles.shape[-1]):
            tiles[..., i, j] = size[..., 128 * i : 128 * i + 128, 128 * j : 128 * j + 128].max(
                axis=(-2, -1), initial=0
            )
    return tiles


def _fp8_wide(scale: Array, fmt: str, shape: tuple[int, ...]) -> Array:
    if fmt == "fp8":
        return np.broadcast_to(scale, shape[:-2])[..., None, None]
    if fmt == "fp8_per_channel":
        return scale.reshape(*shape[:-1], 1)
    rows, columns = np.arange(shape[-2]) // 128, np.arange(shape[-1]) // 128
    return scale[..., rows[:, None], columns[None, :]]


def fp8_encode(
    values: Array, fmt: str, *, amax: Array | float | None = None, scale: Array | None = None
) -> Parts:
    """Encode as FP8; ``amax`` in the scale's shape or a scalar, ``scale`` the scales themselves."""
    x = np.asarray(values).astype(np.float32)
    with np.errstate(**QUIET):
        if scale is None:
            own = fp8_amax(x, fmt)
            scale = (
                own if amax is None else np.broadcast_to(np.asarray(amax, np.float32), own.shape)
            ) / np.float32(448)
            scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
        return {"weight": e4m3(x / _fp8_wide(scale, fmt, x.shape)), FP8_LEAF[fmt]: scale}


def fp8_decode(parts: Parts, fmt: str) -> Array:
    """Return ``code * scale`` in float32."""
    code = parts["weight"]
    with np.errstate(**QUIET):
        return e4m3_values(code) * _fp8_wide(parts[FP8_LEAF[fmt]], fmt, code.shape)
