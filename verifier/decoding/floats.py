# SPDX-License-Identifier: Apache-2.0
"""Decoders of small floats: E2M1, E2M3, E3M2 and E4M3 under block, row, tile and tensor scales."""

from __future__ import annotations

import numpy as np

from verifier.decoding.bits import unpacked
from verifier.decoding.parts import (
    Array,
    Bytes,
    Parts,
    as_bytes,
    as_floats,
    as_words,
    by_matrix,
    fitted,
    part,
    scale_part,
    weight_part,
)
from verifier.decoding.tables import (
    Float32,
    e2m3_table,
    e3m2_table,
    e4m3_table,
    e8m0_table,
    nibble_pairs,
)
from verifier.errors import ContentError
from verifier.schemes import Format


def nvfp4(parts: Parts, fmt: Format) -> Float32:
    """Return E2M1 codes times their blocks' whole scale, [..., out, in].

    The whole scale is ``weight_scale * weight_scale_2``, or ``weight_scale /
    weight_global_scale``, in float32.
    """
    packed, scale = as_bytes(weight_part(parts, fmt)), as_bytes(scale_part(parts, fmt))
    second = fmt.siblings[1]
    whole = by_matrix(part(parts, *second.leaves, fmt=fmt), packed.shape[:-2], fmt)
    width, size = packed.shape[-1] * 2, fmt.group_size or 16
    if scale.shape != (*packed.shape[:-1], width // size) or width % size:
        raise ContentError(
            f"nvfp4: weight_scale {list(scale.shape)} does not fit {[*packed.shape[:-1], width]}"
        )
    combine = np.divide if second.divisor else np.multiply
    combined = combine(e4m3_table()[scale], whole)
    values = nibble_pairs()[packed].reshape(*packed.shape[:-1], width // size, size)
    decoded: Float32 = (values * combined[..., None]).reshape(*packed.shape[:-1], width)
    return decoded


def mxfp4(parts: Parts, fmt: Format) -> Float32:
    """Return E2M1 codes times 2^(scale - 127), [..., in]; gpt-oss' ``blocks`` are
    [..., in/32, 16].
    """
    scales = as_bytes(part(parts, "scales", "weight_scale", "scale", fmt=fmt))
    blocks = as_bytes(part(parts, "blocks", "weight", "weight_packed", fmt=fmt))
    if "blocks" not in parts and scales.ndim and blocks.shape[-1:] == (scales.shape[-1] * 16,):
        blocks = blocks.reshape(*scales.shape, 16)
    if blocks.ndim < 2 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise ContentError(
            f"mxfp4: scales {list(scales.shape)} do not fit blocks {list(blocks.shape)}"
        )
    values = nibble_pairs()[blocks].reshape(*scales.shape, 32) * e8m0_table()[scales][..., None]
    decoded: Float32 = values.reshape(*scales.shape[:-1], scales.shape[-1] * 32)
    return decoded


def mxfp6(parts: Parts, fmt: Format) -> Float32:
    """Return six-bit codes, four in three bytes, times 2^(scale - 127)."""
    packed = as_bytes(weight_part(parts, fmt))
    if packed.shape[-1] % 3:
        raise ContentError(f"{fmt.name}: rows of {packed.shape[-1]} bytes, not a multiple of three")
    codes = unpacked(np.ascontiguousarray(packed), 6, packed.shape[-1] * 4 // 3)
    table = e2m3_table() if fmt.weight.codes == "e2m3" else e3m2_table()
    return _by_block(table[codes], e8m0_table()[as_bytes(scale_part(parts, fmt))], fmt)


def mxfp8(parts: Parts, fmt: Format) -> Float32:
    """Return E4M3 values times 2^(scale - 127)."""
    values = e4m3_table()[as_bytes(weight_part(parts, fmt))]
    return _by_block(values, e8m0_table()[as_bytes(scale_part(parts, fmt))], fmt)


def fp8(parts: Parts, fmt: Format) -> Float32:
    """Return E4M3 values times the scale of their matrix."""
    values = e4m3_table()[as_bytes(weight_part(parts, fmt))]
    return values * by_matrix(scale_part(parts, fmt), values.shape[:-2], fmt)


def fp8_per_channel(parts: Parts, fmt: Format) -> Float32:
    """Return E4M3 values times the scale of their row."""
    values = e4m3_table()[as_bytes(weight_part(parts, fmt))]
    scale = fitted(as_floats(scale_part(parts, fmt)), values.shape[:-1], fmt)
    return values * scale[..., None]


def fp8_block(parts: Parts, fmt: Format) -> Float32:
    """Return E4M3 values times the scale of their tile; a U8 scale is E8M0."""
    values = e4m3_table()[as_bytes(weight_part(parts, fmt))]
    out, in_ = values.shape[-2:]
    high, wide = fmt.block or (128, 128)
    grid = (*values.shape[:-2], -(-out // high), -(-in_ // wide))
    tiles = fitted(_tiles(scale_part(parts, fmt), grid), grid, fmt)
    rows = np.repeat(tiles, high, axis=-2)[..., :out, :]
    return values * np.repeat(rows, wide, axis=-1)[..., :in_]


def _tiles(scale: Array, grid: tuple[int, ...]) -> Float32:
    if scale.dtype == np.uint8 and scale.size == np.prod(grid):
        return e8m0_table()[scale]
    return as_floats(scale)


def mlx(parts: Parts, fmt: Format) -> Float32:
    """Return MLX's MXFP4, NVFP4 (without a tensor's scale) or MXFP8, stored in words."""
    codes = as_words(weight_part(parts, fmt), fmt).view(np.uint8)
    values: Float32
    if fmt.weight.codes == "e2m1":
        values = nibble_pairs()[codes].reshape(*codes.shape[:-1], codes.shape[-1] * 2)
    else:
        values = e4m3_table()[codes]
    table = e4m3_table() if fmt.name == "mlx_nvfp4" else e8m0_table()
    return _by_block(values, table[_scale_bytes(parts, fmt)], fmt)


def _scale_bytes(parts: Parts, fmt: Format) -> Bytes:
    return as_bytes(scale_part(parts, fmt))


def _by_block(values: Float32, scale: Float32, fmt: Format) -> Float32:
    size = fmt.group_size or 1
    if scale.shape != (*values.shape[:-1], -(-values.shape[-1] // size)):
        raise ContentError(
            f"{fmt.name}: scale {list(scale.shape)} does not fit a weight of {list(values.shape)}"
        )
    return values * np.repeat(scale, size, axis=-1)[..., : values.shape[-1]]
