# SPDX-License-Identifier: Apache-2.0
"""Quantized values and scales on disk to float32, by numpy look-up tables built from ml_dtypes.

Formats: E2M1, E4M3 and E8M0 as in OCP Microscaling Formats v1.0 section 5.3; NVFP4's two-level
scale as ModelOpt and vLLM read it, ``(weight_scale * weight_scale_2) * code`` in float32. Nothing
here is shared with the exporter's codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.errors import ContentError
from verifier.schemes import FORMATS, Format

Float32 = npt.NDArray[np.float32]
E4M3_MAX = np.float32(448.0)
E2M1_MAX = np.float32(6.0)


@cache
def e4m3_table() -> Float32:
    """Return the 256 values of E4M3 (0x7F and 0xFF are NaN)."""
    values: Float32 = (
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    return values


@cache
def e8m0_table() -> Float32:
    """Return the 256 powers of two of E8M0, 2^(b-127) (0xFF is NaN)."""
    values: Float32 = (
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )
    return values


@cache
def e2m1_table() -> Float32:
    """Return the 16 values of E2M1."""
    values: Float32 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values


@cache
def nibble_pairs() -> Float32:
    """Return [256, 2]: the two E2M1 values of a byte, low nibble (even column) first."""
    codes = np.arange(256)
    return np.stack([e2m1_table()[codes & 15], e2m1_table()[codes >> 4]], axis=1)


def decode(parts: Mapping[str, npt.NDArray[Any]], fmt: str) -> Float32:
    """Return the values of one quantized weight, float32, shape [..., out, in].

    Args:
        parts: the tensors by their leaf on disk (``weight``, ``weight_scale`` or
            ``weight_scale_inv``, ``weight_scale_2``), each in its on-disk dtype or as raw uint8
            bytes of the same shape.
        fmt: a name of `verifier.schemes.FORMATS`; ``mxfp4`` also as gpt-oss ships it, ``blocks``
            [..., in/32, 16] and ``scales`` [..., in/32].

    Raises:
        ContentError: an unknown format, a missing part, a shape that does not fit.
    """
    if fmt == "mxfp4":
        scales = _bytes(_part(parts, "scales", "weight_scale", fmt=fmt))
        blocks = _bytes(_part(parts, "blocks", "weight", "weight_packed", fmt=fmt))
        if "blocks" not in parts and scales.ndim and blocks.shape[-1:] == (scales.shape[-1] * 16,):
            blocks = blocks.reshape(*scales.shape, 16)
        return _mxfp4(blocks, scales)
    found = FORMATS.get(fmt)
    if found is None:
        raise ContentError(f"no format {fmt!r}; one of {', '.join(sorted(FORMATS))}")
    weight = _bytes(_part(parts, "weight", "weight_packed", fmt=fmt))
    if weight.ndim < 2:
        raise ContentError(f"{fmt}: a weight of {weight.ndim} dimensions; [out, in] is the least")
    scale = _part(parts, "weight_scale", "weight_scale_inv", fmt=fmt)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        if fmt == "nvfp4_ct":  # a divisor
            return _packed(
                weight, _bytes(scale), _part(parts, "weight_global_scale", fmt=fmt), np.divide
            )
        if found.packed:
            return _packed(
                weight, _bytes(scale), _part(parts, "weight_scale_2", fmt=fmt), np.multiply
            )
        values = e4m3_table()[weight]
        if fmt == "mxfp8":
            return _by_block(values, e8m0_table()[_bytes(scale)], found)
        return _scaled(values, scale, found)


def _mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> Float32:
    """Return E2M1 codes (even column in the low nibble) times 2^(scale - 127), [..., in]."""
    if blocks.ndim < 2 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise ContentError(
            f"mxfp4: scales {list(scales.shape)} do not fit blocks {list(blocks.shape)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values: Float32 = (
            nibble_pairs()[blocks].reshape(*scales.shape, 32) * e8m0_table()[scales][..., None]
        )
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * 32)


def _part(parts: Mapping[str, npt.NDArray[Any]], *names: str, fmt: str) -> npt.NDArray[Any]:
    for name in names:
        if name in parts:
            return np.asarray(parts[name])
    raise ContentError(f"{fmt}: {names[0]} is missing")


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype.itemsize != 1:
        raise ContentError(f"a tensor of {array.dtype} where one byte a value belongs")
    return array.view(np.uint8)


def _floats(array: npt.NDArray[Any]) -> Float32:
    """Return float32 scales, also from their raw bytes along the last axis."""
    if array.dtype == np.uint8:
        if array.ndim == 0 or array.shape[-1] % 4:
            raise ContentError(f"a scale of {list(array.shape)} bytes where float32 belongs")
        array = np.ascontiguousarray(array).view(np.float32)
    if array.dtype in (
        ml_dtypes.bfloat16,
        np.float16,
    ):  # compressed-tensors keeps FP8 scales in the model's dtype
        return array.astype(np.float32)
    if array.dtype != np.float32:
        raise ContentError(f"a scale of {array.dtype} where float32 belongs")
    return array


def _fitted(scale: Float32, shape: tuple[int, ...], fmt: str) -> Float32:
    """Return a scale in ``shape``; on disk it may have more axes of length 1, or fewer."""
    if [n for n in scale.shape if n != 1] != [n for n in shape if n != 1]:
        raise ContentError(
            f"{fmt}: a scale of shape {list(scale.shape)}; {list(shape)} belongs here"
        )
    return scale.reshape(shape)


def _by_matrix(array: npt.NDArray[Any], lead: tuple[int, ...], fmt: str) -> Float32:
    """Return one scale for each matrix of a stack, or one for all, such that it broadcasts over
    [..., out, in].
    """
    scale = _floats(array)
    return scale.reshape(()) if scale.size == 1 else _fitted(scale, lead, fmt)[..., None, None]


def _packed(
    packed: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.uint8],
    tensor_scale: npt.NDArray[Any],
    combine: Callable[[Float32, Float32], Float32],
) -> Float32:
    """Return codes times their blocks' whole scale, [..., out, in]."""
    width = packed.shape[-1] * 2
    if scale.shape != (*packed.shape[:-1], width // 16) or width % 16:
        raise ContentError(
            f"nvfp4: weight_scale {list(scale.shape)} does not fit {[*packed.shape[:-1], width]}"
        )
    combined = combine(e4m3_table()[scale], _by_matrix(tensor_scale, packed.shape[:-2], "nvfp4"))
    values = nibble_pairs()[packed].reshape(*packed.shape[:-1], width // 16, 16)
    return (values * combined[..., None]).reshape(*packed.shape[:-1], width)


def _by_block(values: Float32, scale: Float32, fmt: Format) -> Float32:
    size = fmt.group_size or 1
    if scale.shape != (*values.shape[:-1], -(-values.shape[-1] // size)):
        raise ContentError(
            f"{fmt.name}: scale {list(scale.shape)} does not fit a weight of {list(values.shape)}"
        )
    return values * np.repeat(scale, size, axis=-1)[..., : values.shape[-1]]


def _scaled(values: Float32, scale: npt.NDArray[Any], fmt: Format) -> Float32:
    """Return values times their float32 scale: one a matrix, a row, or a tile of 128x128."""
    out, in_ = values.shape[-2:]
    if fmt.name == "fp8_block":
        grid = _fitted(
            _floats(scale), (*values.shape[:-2], -(-out // 128), -(-in_ // 128)), fmt.name
        )
        rows = np.repeat(grid, 128, axis=-2)[..., :out, :]
        return values * np.repeat(rows, 128, axis=-1)[..., :in_]
    if fmt.name == "fp8_per_channel":
        return values * _fitted(_floats(scale), values.shape[:-1], fmt.name)[..., None]
    return values * _by_matrix(scale, values.shape[:-2], fmt.name)


def widen(array: npt.NDArray[Any]) -> Float32:
    """Return an unquantized tensor as float32 (BF16 and F16 widen exactly)."""
    return array.astype(np.float32)
