# SPDX-License-Identifier: Apache-2.0
"""MXFP8: E4M3 codes, an E8M0 power-of-two scale for each 32 of a row (OCP MX v1.0, section 5.2).

The exponent is the smallest that keeps the block within 448 (RCEIL), by an integer rule on the float's bits: a
float32 log2 chooses one too low just above 448 * 2^k.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from exporter.codecs.blocks import block_amax, chunks, require_finite, require_fit, rows_of, take, target
from exporter.codecs.constants import E4M3_MAX, E8M0_BIAS, MX_BLOCK
from verifier.errors import EncodeError

_NAN = 255


def exponents(maxima: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 byte of each block, 0 to 254, int32: ceil(log2(amax / 448)) + 127, exactly."""
    return (((maxima.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp_(0, 254)


def _power(byte: torch.Tensor) -> torch.Tensor:
    """Return 2^(127 - byte) in float32: the reciprocal of the block's scale, exact."""
    return _tables(byte.device)[2].index_select(0, byte.reshape(-1)).view(byte.shape)


def encode(
    x: torch.Tensor, *, weight_scale: torch.Tensor | None = None, out: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in].

    Args:
        x: float32, bfloat16 or float16; any stride, any device.
        weight_scale: the E8M0 bytes themselves, uint8 or float8_e8m0fnu [..., out, in/32].
        out: tensors to write into, by leaf, as they are returned.

    Returns:
        ``weight`` float8_e4m3fn [..., out, in], ``weight_scale`` uint8 [..., out, in/32].

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 32 does not divide, a scale of NaN (255), a
            ``weight_scale`` or ``out`` of another shape or dtype.
    """
    flat = rows_of(x, "mxfp8", MX_BLOCK)
    rows, width = flat.shape
    out = out or {}
    shape = (*x.shape[:-1], width // MX_BLOCK)
    code, flat_code = target(out.get("weight"), "mxfp8", "weight", x.shape, torch.float8_e4m3fn, x.device)
    scales, flat_scales = target(out.get("weight_scale"), "mxfp8", "weight_scale", shape, torch.uint8, x.device)
    given = None
    if weight_scale is not None:
        require_fit(weight_scale, "mxfp8", "weight_scale", shape, torch.uint8, torch.float8_e8m0fnu)
        given = weight_scale.view(torch.uint8).reshape(flat_scales.shape)
        if bool((given == _NAN).any()):
            raise EncodeError("mxfp8: the given weight_scale holds NaN (255)")
    for part in chunks(rows, width):
        values = flat[part].float()
        maxima = block_amax(values, MX_BLOCK)
        require_finite(maxima, flat[part], part.start, x.shape)
        byte = exponents(maxima) if given is None else given[part].to(torch.int32)
        flat_scales[part] = byte.to(torch.uint8)
        quotient = values.reshape(*byte.shape, MX_BLOCK) * _power(byte).unsqueeze(-1)
        flat_code[part] = quotient.clamp_(-E4M3_MAX, E4M3_MAX).flatten(-2).to(torch.float8_e4m3fn)
    return {"weight": code, "weight_scale": scales}


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    every = torch.arange(256, dtype=torch.uint8)
    codes = every.view(torch.float8_e4m3fn).float()
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - E8M0_BIAS)
    powers[_NAN] = torch.nan
    inverse = torch.ldexp(torch.ones(256), E8M0_BIAS - torch.arange(256))
    return codes.to(device), powers.to(device), inverse.to(device)


def decode(
    parts: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``code * 2^(scale - 127)`` in float32, cast to ``dtype``; a ragged last block is read, [..., out, in].

    Args:
        parts: ``weight`` float8_e4m3fn [..., out, in] and ``weight_scale`` (or ``weight_scale_inv``) float8_e8m0fnu
            [..., out, ceil(in/32)], or their bytes as uint8.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    code = take(parts, "mxfp8", ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale = take(parts, "mxfp8", ("weight_scale", "weight_scale_inv"), torch.uint8, torch.float8_e8m0fnu).view(torch.uint8)
    width = code.shape[-1]
    require_fit(scale, "mxfp8", "weight_scale", (*code.shape[:-1], -(-width // MX_BLOCK)))
    result, flat = target(out, "mxfp8", "out", code.shape, dtype, code.device)
    rows = flat.shape[0]
    flat_code, flat_scale = code.reshape(flat.shape), scale.reshape(rows, scale.shape[-1])
    codes, powers, _ = _tables(code.device)
    for part in chunks(rows, width):
        index = flat_code[part].to(torch.int32)
        values = codes.index_select(0, index.reshape(-1)).view(index.shape)
        factor = powers.index_select(0, flat_scale[part].to(torch.int32).reshape(-1)).view(index.shape[0], -1)
        if width % MX_BLOCK:
            flat[part] = values * factor.repeat_interleave(MX_BLOCK, dim=1)[:, :width]
        else:
            flat[part] = (values.reshape(*factor.shape, MX_BLOCK) * factor.unsqueeze(-1)).flatten(-2)
    return result
