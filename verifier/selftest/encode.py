# SPDX-License-Identifier: Apache-2.0
"""Plain ``max`` encoding of one weight, for defects that put a quantized tensor where none belongs,
or decode one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def nvfp4(values: Array, amax: float | None = None) -> dict[str, Array]:
    """Return NVFP4 tensors by leaf for values [out, in], in divisible by 16; ``input_scale`` is 1.

    ``amax`` is a maximum shared with other tensors; their own by default.
    """
    out, width = values.shape
    wide = values.astype(np.float32).reshape(out, width // 16, 16)
    scale_2 = np.float32((amax or np.abs(wide).max()) / 2688)
    scale = np.clip(np.abs(wide).max(axis=2) / (6 * scale_2), 2**-9, 448).astype(E4M3)
    steps = scale.astype(np.float32)[..., None] * scale_2
    codes = np.clip(wide / steps, -6, 6).astype(E2M1).view(np.uint8).reshape(out, width)
    return {
        "weight": codes[:, ::2] | (codes[:, 1::2] << 4),
        "weight_scale": scale,
        "weight_scale_2": np.asarray(scale_2),
        "input_scale": np.asarray(1.0, np.float32),
    }


def mxfp8(values: Array, leaf: str = "weight_scale") -> dict[str, Array]:
    """Return MXFP8 tensors by leaf for values [out, in], in divisible by 32."""
    out, width = values.shape
    wide = values.astype(np.float32).reshape(out, width // 32, 32)
    exponent = np.ceil(np.log2(np.maximum(np.abs(wide).max(axis=2), 2.0**-100) / 448)).astype(
        np.int32
    )
    codes = (wide * np.exp2(-exponent.astype(np.float32))[..., None]).astype(E4M3)
    return {"weight": codes.reshape(out, width), leaf: (exponent + 127).astype(np.uint8)}


def decoded(parts: dict[str, Array]) -> Array:
    """Return the values of NVFP4 or MXFP8 tensors by leaf, float32 [out, in]."""
    weight = parts["weight"]
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    if scale is None:
        raise ValueError("no block scale")
    if weight.dtype == np.uint8:
        codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1, 16)
        steps = scale.astype(np.float32) * parts["weight_scale_2"].astype(np.float32)
        values = codes.view(E2M1).astype(np.float32)
    else:
        values = weight.astype(np.float32).reshape(len(weight), -1, 32)
        steps = np.exp2(scale.view(np.uint8).astype(np.float32) - 127)
    result: Array = (values * steps[..., None]).reshape(len(weight), -1)
    return result
