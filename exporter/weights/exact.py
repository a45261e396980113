# SPDX-License-Identifier: Apache-2.0
"""MXFP4 to NVFP4 without loss where NVFP4's range allows: both hold E2M1 codes, and E4M3 holds the
powers 2^-9 to 2^8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exporter import codecs
from exporter.codecs.constants import E8M0_BIAS, MX_BLOCK, NVFP4_BLOCK
from exporter.codecs.foreign import mxfp4_codes
from verifier.errors import EncodeError

TOP = 8
"""Exponent of E4M3's largest power of two."""
FLOOR = -9
"""Exponent of E4M3's smallest power of two."""


def exact(
    weights: Sequence[codecs.Parts], *, top: int | None = None
) -> tuple[list[codecs.Parts], int, int]:
    """Return the NVFP4 tensors of the MXFP4 weights of a fused group, the blocks of 16, and how
    many lost something.

    ``weight_scale_2`` is the power of two that maps the group's largest block exponent to 2^8; a
    block more than 17 octaves below gets the smallest scale and the codes nearest under it.

    Args:
        weights: for each, the tensors of an MXFP4 weight [..., out, in] as `exporter.codecs.decode`
            takes them.
        top: the largest block exponent of a group that is larger than these (`top_exponent`).

    Raises:
        EncodeError: a scale that is NaN, or values beyond float32.
    """
    read = [mxfp4_codes(w) for w in weights]
    used = [_used(code, scale) for code, scale in read]
    for (_, scale), mask in zip(read, used, strict=True):
        if bool((scale[mask] == 255).any()):
            raise EncodeError("mxfp4: a block scale is NaN (255)")
    if top is None:
        top = max(
            (int(s[m].max()) for (_, s), m in zip(read, used, strict=True) if bool(m.any())),
            default=E8M0_BIAS + TOP,
        )
    scale_2 = torch.ldexp(torch.tensor(1.0), torch.tensor(top - E8M0_BIAS - TOP))
    made, blocks, lost = [], 0, 0
    for parts, (_, scale), mask in zip(weights, read, used, strict=True):
        values = codecs.decode(parts, "mxfp4")
        power = (scale.to(torch.int32) - top + TOP).clamp_(min=FLOOR)
        wanted = torch.where(
            mask, torch.ldexp(torch.ones_like(power, dtype=torch.float32), power), 1.0
        )
        block_scale = wanted.repeat_interleave(MX_BLOCK // NVFP4_BLOCK, -1).to(torch.float8_e4m3fn)
        found = codecs.encode(values, "nvfp4", weight_scale_2=scale_2, weight_scale=block_scale)
        differs = (
            (codecs.decode(found, "nvfp4") != values)
            .reshape(*block_scale.shape, NVFP4_BLOCK)
            .any(-1)
        )
        made.append(found)
        blocks, lost = blocks + differs.numel(), lost + int(differs.sum())
    return made, blocks, lost


def top_exponent(parts: codecs.Parts) -> int | None:
    """Return the largest scale byte of an MXFP4 weight's blocks that hold anything but zeros; None
    without any.
    """
    code, scale = mxfp4_codes(parts)
    mask = _used(code, scale)
    return int(scale[mask].max()) if bool(mask.any()) else None


def _used(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return which blocks of 32 hold anything but zeros, bool [..., out, in/32]."""
    return ((code & 0x77) != 0).reshape(*scale.shape, MX_BLOCK // 2).any(-1)
