# SPDX-License-Identifier: Apache-2.0
"""What a format can do on a tensor: the scales of plain ``max`` calibration, and the nearest
values under some scales.

The verifier's own arithmetic: a yardstick to compare errors with, not a reference for bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.decoding import E2M1_MAX, E4M3_MAX, Float32, decode
from verifier.schemes import FORMATS, Format

Scales = dict[str, npt.NDArray[Any]]
COMPARED = frozenset(
    {
        "nvfp4",
        "w4a16_nvfp4",
        "w4a8_nvfp4_fp8",
        "nvfp4_ct",
        "nvfp4_quark",
        "mxfp4",
        "w4a8_mxfp4_fp8",
        "mxfp8",
        "fp8",
        "fp8_per_channel",
        "fp8_block",
    }
)
"""The formats that `max_scales` and `nearest` know, with their usual parameters."""


def is_compared(fmt: Format) -> bool:
    """Whether `max_scales` and `nearest` know a format."""
    return fmt.name in COMPARED and fmt is FORMATS[fmt.name]


def nearest(values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: str) -> Float32:
    """Return the best that a format can do under the stored scales: for each value the nearest that
    it can represent, decoded.

    Args:
        values: float32 [out, in].
        parts: the stored scales, as for `decode`.
        fmt: a name of `verifier.schemes.FORMATS`.
    """
    ones = {**{k: v for k, v in parts.items() if k != "blocks"}, "weight": _ones(values, fmt)}
    step = decode(ones, fmt)  # the whole scale of every value
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.where(step == 0, np.float32(0), values / step)
    if FORMATS[fmt].packed:
        codes = np.clip(quotient, -E2M1_MAX, E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
    else:
        codes = np.clip(quotient, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(invalid="ignore", over="ignore"):
        result: Float32 = codes.astype(np.float32) * step
    return result


def _ones(values: Float32, fmt: str) -> npt.NDArray[np.uint8]:
    """Return a weight whose every code is that of 1.0."""
    if FORMATS[fmt].packed:
        return np.full((*values.shape[:-1], values.shape[-1] // 2), 0x22, np.uint8)
    return np.full(values.shape, 0x38, np.uint8)


def max_scales(values: Float32, fmt: str, amax: float | None = None) -> Scales | None:
    """Return the scales that plain ``max`` calibration gives a weight; None where they are not
    defined.

    Args:
        values: float32 [out, in].
        fmt: a name of `verifier.schemes.FORMATS`.
        amax: the largest magnitude of all weights that share the tensor's scale, at least that of
            ``values``.
    """
    top = np.float32(max(float(np.abs(values).max(initial=0.0)), amax or 0.0))
    if not values.size or not np.isfinite(top) or top == 0:
        return None
    if FORMATS[fmt].layout == "mxfp4":
        return {"weight_scale": _exponents(values, E2M1_MAX)}
    if fmt == "mxfp8":
        padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 32)))
        return {"weight_scale": _exponents(padded, E4M3_MAX)}
    if FORMATS[fmt].packed:
        return _nvfp4_scales(values, top, divisor=fmt == "nvfp4_ct")
    if fmt == "fp8":
        tensor_scale = np.asarray(top / E4M3_MAX, np.float32)
        return {"weight_scale": tensor_scale} if tensor_scale > 0 else None
    if fmt == "fp8_per_channel":
        rows = np.abs(values).max(axis=1) / E4M3_MAX
        return {"weight_scale": np.where(rows == 0, np.float32(1), rows)}
    return {"weight_scale_inv": _tile_scales(values)}


def _exponents(values: Float32, largest: np.float32) -> npt.NDArray[np.uint8]:
    """Return the E8M0 exponent of each block of 32: the least power of two under which no value is
    clipped.
    """
    blocks = np.abs(values).reshape(len(values), -1, 32).max(axis=2)
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log2(blocks / largest))
    result: npt.NDArray[np.uint8] = (np.clip(exponent, -127, 127) + 127).astype(np.uint8)
    return result


def _nvfp4_scales(values: Float32, top: np.float32, *, divisor: bool) -> Scales | None:
    """Return NVFP4's block and tensor scales, the tensor's as a divisor or a factor; None where
    float32 cannot hold it.
    """
    scale_2 = top / np.float32(6 * 448)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale_2
    if scale_2 == 0 or (divisor and np.isinf(inverse)):
        return None
    block = np.abs(values.reshape(values.shape[0], values.shape[1] // 16, 16)).max(axis=2)
    scale = np.clip(block / (E2M1_MAX * scale_2), np.float32(2**-9), E4M3_MAX).astype(
        ml_dtypes.float8_e4m3fn
    )
    if divisor:
        return {"weight_scale": scale, "weight_global_scale": np.asarray(inverse, np.float32)}
    return {"weight_scale": scale, "weight_scale_2": np.asarray(scale_2, np.float32)}


def _tile_scales(values: Float32) -> Float32:
    """Return one scale for each tile of 128x128; 1 for a tile that is all zero."""
    out, in_ = values.shape
    tiles = np.zeros((-(-out // 128), -(-in_ // 128)), np.float32)
    for i, j in np.ndindex(tiles.shape):
        tile = values[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        tiles[i, j] = np.abs(tile).max(initial=0.0) / E4M3_MAX
    return np.where(tiles == 0, np.float32(1), tiles)
