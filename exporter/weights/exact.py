# SPDX-License-Identifier: Apache-2.0
"""MXFP4 to NVFP4 without loss where the range of NVFP4 allows it: both have E2M1 codes, and E4M3
has the powers 2^-9 to 2^8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exporter import codecs
from exporter.codecs.constants import E8M0_BIAS, MX_BLOCK, NVFP4_BLOCK
from exporter.codecs.foreign import mxfp4_codes
from exporter.codecs.tables import E8M0_NAN
from verifier.errors import EncodeError

TOP = 8
"""Exponent of E4M3's largest power of two."""
FLOOR = -9
"""Exponent of E4M3's smallest power of two."""


def exact(
    weights: Sequence[codecs.Parts], *, top: int | None = None
) -> tuple[list[codecs.Parts], int, int]:
    """Convert the MXFP4 weights of a fused group to NVFP4.

    ``weight_scale_2`` is the power of two that maps the group's largest block exponent to 2^8; a
    block more than 17 octaves below gets the smallest scale and the nearest codes.

    Args:
        weights: for each, the tensors of an MXFP4 weight [..., out, in] as `exporter.codecs.decode`
            takes them.
        top: the largest block exponent (`top_exponent`) of the group, if it has more weights.

    Returns:
        The NVFP4 tensors of each weight, the number of blocks of 16, and how many blocks changed
        in value.

    Raises:
        EncodeError: a scale that is NaN, or values beyond float32.
    """
    pairs = [mxfp4_codes(w) for w in weights]
    masks = [_nonzero(code, scale) for code, scale in pairs]
    scales = [scale for _, scale in pairs]
    for scale, mask in zip(scales, masks, strict=True):
        if bool((scale[mask] == E8M0_NAN).any()):
            raise EncodeError("mxfp4: a block scale is NaN (255)")
    if top is None:
        tops = [int(s[m].max()) for s, m in zip(scales, masks, strict=True) if bool(m.any())]
        top = max(tops, default=E8M0_BIAS + TOP)
    scale_2 = torch.ldexp(torch.tensor(1.0), torch.tensor(top - E8M0_BIAS - TOP))
    converted, blocks, changed = [], 0, 0
    for parts, scale, mask in zip(weights, scales, masks, strict=True):
        values = codecs.decode(parts, "mxfp4")
        block_scale = _block_scales(scale, mask, top)
        result = codecs.encode(values, "nvfp4", weight_scale_2=scale_2, weight_scale=block_scale)
        differs = codecs.decode(result, "nvfp4") != values
        differs = differs.reshape(*block_scale.shape, NVFP4_BLOCK).any(-1)
        converted.append(result)
        blocks += differs.numel()
        changed += int(differs.sum())
    return converted, blocks, changed


def _block_scales(scale: torch.Tensor, nonzero: torch.Tensor, top: int) -> torch.Tensor:
    """Return E4M3 scales per 16 values for E8M0 bytes per 32; 1.0 for blocks of zeros."""
    power = (scale.to(torch.int32) - top + TOP).clamp_(min=FLOOR)
    values = torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)
    values = torch.where(nonzero, values, 1.0)
    return values.repeat_interleave(MX_BLOCK // NVFP4_BLOCK, -1).to(torch.float8_e4m3fn)


def top_exponent(parts: codecs.Parts) -> int | None:
    """Return the largest scale byte of an MXFP4 weight's nonzero blocks; None if all are zero."""
    code, scale = mxfp4_codes(parts)
    mask = _nonzero(code, scale)
    return int(scale[mask].max()) if bool(mask.any()) else None


def _nonzero(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return which blocks of 32 have a nonzero value, bool [..., out, in/32]."""
    return ((code & 0x77) != 0).reshape(*scale.shape, MX_BLOCK // 2).any(-1)
