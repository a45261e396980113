# SPDX-License-Identifier: Apache-2.0
"""Encode a weight under a calibration method: search the block scales, then encode under them."""

from __future__ import annotations

import torch

from exporter import codecs
from exporter.codecs.blocks import block_amax, chunks, given_amax, per_row, require_finite, rows_of
from exporter.codecs.constants import NVFP4_BLOCK
from exporter.weights.search import Method, block_scales, global_divisor
from verifier.errors import EncodeError


def encode(x: torch.Tensor, fmt: str, *, method: Method = "max", amax: torch.Tensor | None = None) -> codecs.Parts:
    """Return the tensors of a weight [..., out, in] by their leaf on disk, its scales chosen by ``method``.

    Args:
        x: float32, bfloat16 or float16; a stack is one call.
        fmt: a format name; methods other than ``max`` are NVFP4's.
        method: one of `exporter.weights.METHODS`.
        amax: the maximum that a fused group shares, a scalar, or [...] of a stack; not for ``mxfp8``.

    Raises:
        EncodeError: NaN or infinity, a width that the block does not divide, a method that the format does not have, an
            ``amax`` that is negative, not finite or of another shape.
    """
    packed = fmt in ("nvfp4", "w4a16_nvfp4")
    if method == "max" or not packed:
        if method != "max":
            raise EncodeError(f"{fmt}: no calibration method {method!r}; it has max only")
        return codecs.encode(x, fmt, amax=amax)
    top = codecs.amax(x, fmt) if amax is None else given_amax(amax, fmt, x.shape[:-2], x.device)
    scale_2 = top / global_divisor(method)
    scale_2 = torch.where(top == 0, torch.ones_like(scale_2), scale_2.clamp(min=2.0**-149))
    return codecs.encode(x, fmt, weight_scale_2=scale_2, weight_scale=search(x, scale_2, method))


def search(x: torch.Tensor, scale_2: torch.Tensor, method: Method) -> torch.Tensor:
    """Return the block scales of a weight or stack under its global scale, float8_e4m3fn [..., out, in/16].

    Args:
        x: float32, bfloat16 or float16 [..., out, in].
        scale_2: positive, float32, a scalar or [...].
        method: one of `exporter.weights.METHODS`.

    Raises:
        EncodeError: NaN or infinity in ``x``, or a width that 16 does not divide.
    """
    flat = rows_of(x, "nvfp4", NVFP4_BLOCK)
    rows, width = flat.shape
    scales = torch.empty((rows, width // NVFP4_BLOCK), dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = per_row(scale_2, x.shape)
    for part in chunks(rows, width):
        values = flat[part].float()
        maxima = block_amax(values, NVFP4_BLOCK)
        require_finite(maxima, flat[part], part.start, x.shape)
        wide = row_scale if row_scale.shape[0] == 1 else row_scale[part]
        magnitude = values.abs_() if values.data_ptr() != flat[part].data_ptr() else values.abs()
        scales[part] = block_scales(magnitude.reshape(*maxima.shape, NVFP4_BLOCK), maxima, wide, method)
    return scales.reshape(*x.shape[:-1], width // NVFP4_BLOCK)
