# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 with float32 scales: one a tensor, one a row, or one for each 128x128 tile (DeepSeek-V3, section 3.3)."""

from __future__ import annotations

import torch

from exporter.codecs.blocks import require_finite, rows_of
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
        weight_scale: the scale itself.

    Raises:
        EncodeError: NaN or infinity in ``x``.
    """
    rows_of(x, fmt, 1)
    values = x.float()
    require_finite(values.abs().amax().reshape(1) if x.numel() else values.new_zeros(1), x.reshape(-1, x.shape[-1]), 0, x.shape)
    if weight_scale is None:
        top = torch.as_tensor(amax, dtype=torch.float32, device=x.device) if amax is not None else _amax(values, fmt)
        scale = top / E4M3_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = weight_scale.float()
    code = (values / _wide(scale, fmt, x.shape)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"weight": code, SCALE_LEAF[fmt]: scale}


def _amax(values: torch.Tensor, fmt: str) -> torch.Tensor:
    size = values.abs()
    if fmt == "fp8":
        return size.amax((-2, -1))
    if fmt == "fp8_per_channel":
        return size.amax(-1)
    out, in_ = values.shape[-2:]
    padded = torch.nn.functional.pad(size, (0, -in_ % FP8_TILE, 0, -out % FP8_TILE))
    return padded.unflatten(-1, (-1, FP8_TILE)).unflatten(-3, (-1, FP8_TILE)).amax((-3, -1))


def _wide(scale: torch.Tensor, fmt: str, shape: torch.Size) -> torch.Tensor:
    if fmt == "fp8":
        return scale.reshape(()) if scale.numel() == 1 else scale[..., None, None]
    if fmt == "fp8_per_channel":
        return scale.reshape(*shape[:-1], 1)
    out, in_ = shape[-2:]
    grid = scale.reshape(*shape[:-2], -(-out // FP8_TILE), -(-in_ // FP8_TILE))
    rows = grid.repeat_interleave(FP8_TILE, -2)[..., :out, :]
    return rows.repeat_interleave(FP8_TILE, -1)[..., :in_]


def decode(
    parts: dict[str, torch.Tensor], fmt: str, *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``code * scale`` in float32, cast to ``dtype``; [..., out, in]."""
    leaf = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
    code = parts["weight"]
    if leaf not in parts:
        raise EncodeError(f"{fmt}: weight_scale is missing")
    values = code.view(torch.float8_e4m3fn).float() * _wide(parts[leaf].float(), fmt, code.shape)
    return values.to(dtype) if out is None else out.copy_(values)
