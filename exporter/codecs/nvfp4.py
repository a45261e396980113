# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 codes, an E4M3 scale for each 16 of a row, a float32 scale for each tensor.

Byte for byte what ModelOpt 0.47 packs for finite input that is not all zero; an all-zero tensor has a defined result
here (codes 0, block scales 1.0, ``weight_scale_2`` 1.0) where ModelOpt writes NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from exporter.codecs.blocks import (
    FLOATS,
    block_amax,
    chunks,
    given_amax,
    per_row,
    require_finite,
    require_fit,
    require_positive,
    rows_of,
    scalar_or,
    take,
    target,
    tensor_amax,
)
from exporter.codecs.constants import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE, SCALE_FLOOR
from verifier.errors import EncodeError

_EXPONENT = 0x7F800000
_ONE = 0x3F800000
_TINY = torch.finfo(torch.float32).tiny


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Return ``weight_scale_2`` = amax / 2688 in float32; 1.0 where amax is zero, and at least the smallest subnormal."""
    scale = amax.float() / NVFP4_RANGE
    scale = torch.where((scale == 0) & (amax > 0), torch.full_like(scale, 2.0**-149), scale)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def encode(
    x: torch.Tensor,
    *,
    amax: torch.Tensor | float | None = None,
    weight_scale_2: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in] (float32, bfloat16, float16; any stride, any device).

    Args:
        x: the weights; a stack is encoded in one call, each matrix with its own global scale.
        amax: the maximum to derive ``weight_scale_2`` from, shared by a fused group or a stack (scalar, or [...]).
        weight_scale_2: the global scale itself, float32, scalar or [...]; then ``amax`` must be None.
        weight_scale: the block scales themselves, float8_e4m3fn or its bytes as uint8, [..., out, in/16]; then
            ``weight_scale_2`` must be given.
        out: tensors to write into, by leaf, as they are returned.

    Returns:
        ``weight`` uint8 [..., out, in/2] (even column in the low nibble), ``weight_scale`` float8_e4m3fn
        [..., out, in/16], ``weight_scale_2`` float32 [...] (scalar where a scalar was given).

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 16 does not divide, arguments that contradict,
            a given scale that is not positive and finite, a given tensor or ``out`` of another shape or dtype.
    """
    flat = rows_of(x, "nvfp4", NVFP4_BLOCK)
    scale_2 = _global(x, amax, weight_scale_2, weight_scale)
    rows, width = flat.shape
    out = out or {}
    lead, grid = x.shape[:-1], (*x.shape[:-1], width // NVFP4_BLOCK)
    packed, flat_packed = target(out.get("weight"), "nvfp4", "weight", (*lead, width // 2), torch.uint8, x.device)
    scales, flat_scales = target(out.get("weight_scale"), "nvfp4", "weight_scale", grid, torch.float8_e4m3fn, x.device)
    given = _given_scales(weight_scale, grid).reshape(flat_scales.shape) if weight_scale is not None else None
    if "weight_scale_2" in out:
        require_fit(out["weight_scale_2"], "nvfp4", "weight_scale_2", scale_2.shape, torch.float32)
        scale_2 = out["weight_scale_2"].copy_(scale_2)
    row_scale = per_row(scale_2, x.shape)
    for part in chunks(rows, width):
        values = flat[part].float()
        wide = row_scale if row_scale.shape[0] == 1 else row_scale[part]
        maxima = block_amax(values, NVFP4_BLOCK)
        require_finite(maxima, flat[part], part.start, x.shape)
        stored = block_scales(maxima, wide) if given is None else given[part]
        flat_scales[part] = stored
        combined = stored.float() * wide
        flat_packed[part] = pack(codes(values, combined))
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2}


def _global(
    x: torch.Tensor,
    amax: torch.Tensor | float | None,
    weight_scale_2: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:
    if weight_scale_2 is not None:
        if amax is not None:
            raise EncodeError("nvfp4: amax and weight_scale_2 were both given; each fixes the other")
        scale_2 = scalar_or(weight_scale_2.float(), "nvfp4", "weight_scale_2", x.shape[:-2])
        require_positive(scale_2, "nvfp4", "weight_scale_2")
        return scale_2
    if weight_scale is not None:
        raise EncodeError("nvfp4: weight_scale was given without the weight_scale_2 that it is relative to")
    if amax is None:
        return global_scale(tensor_amax(x, "nvfp4", NVFP4_BLOCK))
    return global_scale(given_amax(amax, "nvfp4", x.shape[:-2], x.device))


def _given_scales(weight_scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return given block scales as float8_e4m3fn, all of them positive numbers."""
    require_fit(weight_scale, "nvfp4", "weight_scale", shape, torch.float8_e4m3fn, torch.uint8)
    scales = weight_scale.view(torch.float8_e4m3fn)
    require_positive(scales.float(), "nvfp4", "weight_scale")
    return scales


def block_scales(maxima: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of each block from its maximum and its tensor's scale; 1.0 for a zero block."""
    wanted = maxima / (E2M1_MAX * scale_2)
    # Zero, or so far below its tensor that the quotient underflows: nothing of the block survives, whatever the scale.
    zero = wanted == 0
    return wanted.clamp_(SCALE_FLOOR, E4M3_MAX).masked_fill_(zero, 1.0).to(torch.float8_e4m3fn)


def codes(values: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
    """Return the E2M1 codes nearest to values / scale, ties to the even code, uint8 [rows, in].

    Args:
        values: float32 [rows, in].
        combined: ``weight_scale * weight_scale_2``, float32 [rows, in/16].
    """
    quotient = (values.reshape(*combined.shape, NVFP4_BLOCK) / combined.unsqueeze(-1)).flatten(-2)
    negative = (quotient < 0).to(torch.int32) << 3
    y = quotient.abs_().clamp_(max=E2M1_MAX)
    # Adding 2^(22 + k) leaves a unit in the last place of 2^(k-1): the sum is y rounded to even multiples of the
    # E2M1 step in y's binade, and its low bits count those steps.
    exponent = (y.view(torch.int32) & _EXPONENT).clamp_(min=_ONE)
    magic = exponent + (22 << 23)
    steps = (y + magic.view(torch.float32)).view(torch.int32) - magic
    code: torch.Tensor = steps + ((exponent - _ONE) >> 22) + negative
    return code.to(torch.uint8)


def pack(code: torch.Tensor) -> torch.Tensor:
    """Return two codes a byte, the even column in the low nibble, uint8 [rows, in/2]."""
    pairs = code.contiguous().view(torch.int16)
    return ((pairs | (pairs >> 4)) & 0xFF).to(torch.uint8)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibble = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256)
    pairs = torch.stack([nibble[byte & 15], nibble[byte >> 4]], 1)
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return pairs.to(device), scale.to(device)


def decode(
    parts: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``(weight_scale * weight_scale_2) * code`` in float32, cast to ``dtype``; [..., out, in].

    Args:
        parts: the tensors that `encode` returns; ``weight_scale`` may be uint8, ``weight_scale_2`` a scalar or [1].
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    packed = take(parts, "nvfp4", ("weight",), torch.uint8)
    scale = take(parts, "nvfp4", ("weight_scale",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale_2 = scalar_or(take(parts, "nvfp4", ("weight_scale_2",), *FLOATS), "nvfp4", "weight_scale_2", packed.shape[:-2])
    shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))
    if scale.shape != (*shape[:-1], shape[-1] // NVFP4_BLOCK) or shape[-1] % NVFP4_BLOCK:
        raise EncodeError(f"nvfp4: weight_scale {list(scale.shape)} does not fit a weight of {list(shape)}")
    result, flat = target(out, "nvfp4", "out", shape, dtype, packed.device)
    rows = flat.shape[0]
    flat_packed, flat_scale = packed.reshape(rows, packed.shape[-1]), scale.reshape(rows, scale.shape[-1])
    pairs, table = _tables(packed.device)
    row_scale = per_row(scale_2, shape)
    for part in chunks(rows, shape[-1]):
        index = flat_packed[part].to(torch.int32)
        values = pairs.index_select(0, index.reshape(-1)).view(index.shape[0], -1, NVFP4_BLOCK)
        wide = row_scale if row_scale.shape[0] == 1 else row_scale[part]
        combined = table.index_select(0, flat_scale[part].to(torch.int32).reshape(-1)).view(index.shape[0], -1) * wide
        flat[part] = (values * combined.unsqueeze(-1)).flatten(1)
    return result
