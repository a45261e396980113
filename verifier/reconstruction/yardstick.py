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

from verifier.decoding import DECODERS, E2M1_MAX, E4M3_MAX, Float32, decode
from verifier.decoding.parts import as_floats
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
"""The formats that `max_scales` knows, with their usual parameters."""


def is_compared(fmt: Format) -> bool:
    """Whether weights of a format are compared with the base: its values are decoded."""
    return fmt.name in DECODERS


def is_sliced(fmt: Format) -> bool:
    """Whether a weight of a format is compared some rows at a time, by `max_scales`."""
    return fmt.name in COMPARED and fmt is FORMATS[fmt.name]


def has_tensor_scale(fmt: Format) -> bool:
    """Whether `max_scales` of a format depend on the amax of the tensor."""
    return is_sliced(fmt) and (fmt.name == "fp8" or (fmt.packed and fmt.layout != "mxfp4"))


def nearest(values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: str | Format) -> Float32:
    """Return the best that a format can do under the stored scales: for each value the nearest that
    it can represent, decoded.

    Args:
        values: float32 [out, in].
        parts: the stored scales, as for `decode`.
        fmt: a format, or a name of `verifier.schemes.FORMATS`.
    """
    known = FORMATS[fmt] if isinstance(fmt, str) else fmt
    core, factor, added = _apart(parts, values)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        target = values if factor is None else np.where(factor == 0, 0, values / factor)
        target = np.asarray(target if added is None else target - added, np.float32)
        whole = known.weight.codes == "int"
        result = (_nearest_integers if whole else _nearest_floats)(target, core, known)
        result = result if added is None else result + added
        return np.asarray(result if factor is None else result * factor, np.float32)


def _apart(
    parts: Mapping[str, npt.NDArray[Any]], values: Float32
) -> tuple[dict[str, npt.NDArray[Any]], Float32 | None, Float32 | None]:
    """Return the scales of the codes, the factor of each input and the low-rank correction."""
    core = {k: v for k, v in parts.items() if k not in _BESIDES}
    factor = added = None
    if "pre_quant_scale" in parts:
        factor = as_floats(np.asarray(parts["pre_quant_scale"])).reshape(values.shape[-1])
    if "svdquant_lora_a" in parts and "svdquant_lora_b" in parts:
        a, b = (as_floats(np.asarray(parts[f"svdquant_lora_{x}"])) for x in "ab")
        added = np.asarray(b @ a, np.float32)
    return core, factor, added


def _nearest_floats(values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: Format) -> Float32:
    leaf, weight = _weight_of(parts, fmt, _ones(values, fmt))
    step = decode({**parts, leaf: weight}, fmt)  # the whole scale of every value
    dtype, largest = _CODES[fmt.weight.codes]
    quotient = np.where(step == 0, np.float32(0), values / step)
    codes = np.clip(quotient, -largest, largest).astype(dtype)
    result: Float32 = codes.astype(np.float32) * step
    return result


def _nearest_integers(
    values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: Format
) -> Float32:
    """Return the nearest of ``zero + step * q``: both follow from codes that are all 0, and codes
    whose bits are all set.
    """
    leaf, weight = _weight_of(parts, fmt, None)
    zero = decode({**parts, leaf: np.zeros_like(weight)}, fmt)
    bits = np.full(weight.nbytes, 0xFF, np.uint8).view(weight.dtype).reshape(weight.shape)
    full = decode({**parts, leaf: bits}, fmt)
    signed = fmt.layout in _TWOS_COMPLEMENT and not fmt.name.startswith("uint4")
    steps = (1 << fmt.bits) - 1
    step = zero - full if signed else (full - zero) / np.float32(steps)
    low, high = (-(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1) if signed else (0, steps)
    q = np.where(step == 0, np.float32(0), np.rint((values - zero) / step))
    result: Float32 = zero + np.clip(q, low, high) * step
    return result


def _weight_of(
    parts: Mapping[str, npt.NDArray[Any]], fmt: Format, made: npt.NDArray[np.uint8] | None
) -> tuple[str, npt.NDArray[Any]]:
    """Return the leaf of the weight and ``made``, in the place of the stored codes."""
    leaf = next((n for n in fmt.weight.leaves if n in parts and n != "blocks"), "weight")
    if made is not None:
        return leaf, made
    return leaf, np.asarray(parts[leaf])


_BESIDES = frozenset({"pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "blocks"})
_TWOS_COMPLEMENT = frozenset({"int8", "int4_awq", "int4_quark"})
_CODES: dict[str, tuple[npt.DTypeLike, np.float32]] = {
    "e2m1": (ml_dtypes.float4_e2m1fn, E2M1_MAX),
    "e2m3": (ml_dtypes.float6_e2m3fn, np.float32(7.5)),
    "e3m2": (ml_dtypes.float6_e3m2fn, np.float32(28)),
    "e4m3": (ml_dtypes.float8_e4m3fn, E4M3_MAX),
}


def _ones(values: Float32, fmt: Format) -> npt.NDArray[Any]:
    """Return a weight whose every code is that of 1.0."""
    width = values.shape[-1]
    code, size = {
        "e2m1": (bytes([0x22]), width // 2),
        "e2m3": (_SIXES_OF_8, width * 3 // 4),
        "e3m2": (_SIXES_OF_12, width * 3 // 4),
        "e4m3": (bytes([0x38]), width),
    }[fmt.weight.codes]
    row = np.resize(np.frombuffer(code, np.uint8), size)
    ones = np.broadcast_to(row, (*values.shape[:-1], size)).copy()
    return ones.view(np.uint32) if fmt.weight_dtype == "U32" else ones


def _sixes(code: int) -> bytes:
    """Return three bytes that hold one six-bit code four times."""
    return sum(code << (6 * k) for k in range(4)).to_bytes(3, "little")


_SIXES_OF_8, _SIXES_OF_12 = _sixes(8), _sixes(12)


def by_max(
    values: Float32,
    parts: Mapping[str, npt.NDArray[Any]],
    fmt: Format,
    amax: float | None = None,
) -> Float32 | None:
    """Return a weight as plain ``max`` calibration gives it, decoded; None where that is not
    defined.

    Args:
        values: float32 [out, in].
        parts: the stored tensors: a factor of inputs, a correction and zero points are kept.
        fmt: the format.
        amax: the largest magnitude of all weights that share the tensor's scale.
    """
    core, factor, added = _apart(parts, values)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        target = values if factor is None else np.where(factor == 0, 0, values / factor)
        target = np.asarray(target if added is None else target - added, np.float32)
        if not np.isfinite(target).all():
            return None
        result = _core_by_max(target, core, fmt, None if factor is not None else amax)
        if result is None:
            return None
        result = result if added is None else result + added
        return np.asarray(result if factor is None else result * factor, np.float32)


def _core_by_max(
    values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: Format, amax: float | None
) -> Float32 | None:
    if fmt.name in COMPARED and fmt is FORMATS[fmt.name]:
        scales = max_scales(values, fmt.name, amax)
        return nearest(values, scales, fmt) if scales is not None else None
    if not values.size or not np.isfinite(values).all() or not values.any():
        return None
    if fmt.weight.codes == "int":
        return _integers_by_max(values, parts, fmt)
    largest = float(_CODES[fmt.weight.codes][1])
    peak = _peaks(values, fmt)
    scale = peak / np.float32(largest)
    if fmt.siblings[0].dtypes[0] in ("U8", "F8_E8M0") and fmt.siblings[0].holds == "":
        scale = np.exp2(np.clip(np.ceil(np.log2(scale)), -127, 127)).astype(np.float32)
    step = np.where(scale == 0, np.float32(1), scale)
    dtype, top = _CODES[fmt.weight.codes]
    result: Float32 = np.clip(values / step, -top, top).astype(dtype).astype(np.float32) * step
    return result


def _peaks(values: Float32, fmt: Format) -> Float32:
    """Return the largest magnitude of each value's block."""
    rows, group = fmt.block or (1, values.shape[1])
    out, in_ = values.shape
    wide = np.pad(np.abs(values), ((0, -out % rows), (0, -in_ % group)))
    blocks = wide.reshape(wide.shape[0] // rows, rows, wide.shape[1] // group, group)
    peak = blocks.max(axis=(1, 3), keepdims=True)
    whole = np.broadcast_to(peak, blocks.shape).reshape(wide.shape)
    return np.asarray(whole[:out, :in_], np.float32)


def _integers_by_max(
    values: Float32, parts: Mapping[str, npt.NDArray[Any]], fmt: Format
) -> Float32:
    """Return integers under the largest magnitude, or under the range, of each block."""
    high = np.float32((1 << fmt.bits) - 1)
    if fmt.of_role("zero_point") is None and fmt.of_role("bias") is None:
        step = _peaks(values, fmt) / (high / 2)
        step = np.where(step == 0, np.float32(1), step)
        symmetric: Float32 = np.clip(np.rint(values / step), -(high + 1) / 2, high // 2) * step
        return symmetric
    top, bottom = _peaks(np.maximum(values, 0), fmt), -_peaks(np.maximum(-values, 0), fmt)
    step = (top - bottom) / high
    step = np.where(step == 0, np.float32(1), step)
    zero = np.rint(-bottom / step)
    result: Float32 = (np.clip(np.rint(values / step) + zero, 0, high) - zero) * step
    return result


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
