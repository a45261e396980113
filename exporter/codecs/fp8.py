# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 with float32 scales: one a tensor, one a row, or one for each 128x128 tile (DeepSeek-V3, section 3.3)."""

from __future__ import annotations

import torch

from exporter.codecs.blocks import FLOATS, given_amax, require_finite, require_fit, require_positive, rows_of, take
from exporter.codecs.constants import E4M3_MAX, FP8_TILE
from verifier.errors import EncodeError

SCALE_LEAF = {"fp8": "weight_scale", "fp8_per_channel": "weight_scale", "fp8_block": "weight_scale_inv"}


def encode(
    x: torch.Tensor, fmt: str, *, amax: torch.Tensor | float | None = None, weight_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in] as E4M3 with float32 scales.

    Args:
        x: float32, bfloat16 or float16.
        fmt: ``fp8`` (scale [...]), ``fp8_per_channel`` ([..., out]) or ``fp8_block`` ([..., out/128, in/128], ceil).
        amax: the maximum to derive the scale from, in the scale's shape or a scalar.
        weight_scale: the scale itself, its axes of length 1 more or fewer; for ``fp8`` one for all will do.

    Returns:
        ``weight`` float8_e4m3fn [..., out, in]; ``weight_scale`` (``weight_scale_inv`` for ``fp8_block``) float32.

    Raises:
        EncodeError: NaN or infinity in ``x``, an ``amax`` or ``weight_scale`` of another shape, an ``amax`` that is
            negative or not finite, a ``weight_scale`` that is not positive and finite.
    """
    rows_of(x, fmt, 1)
    values = x.float()
    if x.numel():
        require_finite(values.abs().amax().reshape(1), x.reshape(-1, x.shape[-1]), 0, x.shape)
    if weight_scale is None:
        shape = _scale_shape(fmt, x.shape)
        top = _amax(values, fmt) if amax is None else given_amax(amax, fmt, shape, x.device).expand(shape)
        scale = top / E4M3_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = _fitted(weight_scale.float(), fmt, x.shape).contiguous()
        require_positive(scale, fmt, "weight_scale")
    code = (values / _wide(scale, fmt, x.shape)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"weight": code, SCALE_LEAF[fmt]: scale}


def _scale_shape(fmt: str, shape: torch.Size) -> tuple[int, ...]:
    if fmt == "fp8":
        return tuple(shape[:-2])
    if fmt == "fp8_per_channel":
        return tuple(shape[:-1])
    return (*shape[:-2], -(-shape[-2] // FP8_TILE), -(-shape[-1] // FP8_TILE))


def _fitted(scale: torch.Tensor, fmt: str, shape: torch.Size) -> torch.Tensor:
    """Return a scale in the shape for weights of ``shape``; on disk it may have more axes of length 1, or fewer."""
    wanted = _scale_shape(fmt, shape)
    if fmt == "fp8" and scale.numel() == 1:
        return scale.reshape(()).expand(wanted)
    if [n for n in scale.shape if n != 1] != [n for n in wanted if n != 1]:
        raise EncodeError(f"{fmt}: a scale of shape {list(scale.shape)}; {list(wanted)} belongs here")
    return scale.reshape(wanted)


def _amax(values: torch.Tensor, fmt: str) -> torch.Tensor:
    if values.numel() == 0:
        return values.new_zeros(_scale_shape(fmt, values.shape))
    size = values.abs()
    if fmt == "fp8":
        return size.amax((-2, -1))
    if fmt == "fp8_per_channel":
        return size.amax(-1)
    out, in_ = values.shape[-2:]
    padded = torch.nn.functional.pad(size, (0, -in_ % FP8_TILE, 0, -out % FP8_TILE))
    tiles = (padded.shape[-2] // FP8_TILE, FP8_TILE, padded.shape[-1] // FP8_TILE, FP8_TILE)
    return padded.reshape(*values.shape[:-2], *tiles).amax((-3, -1))


def _wide(scale: torch.Tensor, fmt: str, shape: torch.Size) -> torch.Tensor:
    """Return a scale of `_scale_shape` such that it broadcasts over weights of ``shape``."""
    if fmt == "fp8":
        return scale[..., None, None]
    if fmt == "fp8_per_channel":
        return scale[..., None]
    out, in_ = shape[-2:]
    rows = scale.repeat_interleave(FP8_TILE, -2)[..., :out, :]
    return rows.repeat_interleave(FP8_TILE, -1)[..., :in_]


def decode(
    parts: dict[str, torch.Tensor], fmt: str, *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``code * scale`` in float32, cast to ``dtype``; [..., out, in].

    Args:
        parts: ``weight`` float8_e4m3fn [..., out, in], or its bytes as uint8, and ``weight_scale`` (or
            ``weight_scale_inv``) as `encode` takes it.
        fmt: ``fp8``, ``fp8_per_channel`` or ``fp8_block``.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    code = take(parts, fmt, ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.float8_e4m3fn)
    scale = _fitted(take(parts, fmt, ("weight_scale", "weight_scale_inv"), *FLOATS).float(), fmt, code.shape)
    if out is not None:
        require_fit(out, fmt, "out", code.shape, dtype)
    values = code.float() * _wide(scale, fmt, code.shape)
    return values.to(dtype) if out is None else out.copy_(values)
