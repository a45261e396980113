# SPDX-License-Identifier: Apache-2.0
"""Encode a weight under a calibration method: search the block scales, then encode under them."""

from __future__ import annotations

import torch

from exporter import codecs
from exporter.codecs import fast
from exporter.codecs.blocks import (
    Chunk,
    Scratch,
    block_amax,
    checked_amax,
    each_chunk,
    per_row,
    require_finite,
    rows_of,
)
from exporter.codecs.constants import NVFP4_BLOCK
from exporter.weights.search import Method, block_scales, compiled_sweep, global_divisor
from verifier.errors import EncodeError


def encode(
    x: torch.Tensor,
    fmt: str,
    *,
    method: Method = "max",
    amax: torch.Tensor | None = None,
    threads: int | None = None,
) -> codecs.Parts:
    """Return the tensors of a weight [..., out, in] by their leaf on disk, with scales chosen by
    ``method``.

    Args:
        x: float32, bfloat16 or float16; a stack is one call.
        fmt: a format name; methods other than ``max`` are NVFP4's.
        method: one of `exporter.weights.METHODS`.
        amax: the maximum shared by a fused group: a scalar, or [...] of a stack; not for
            ``mxfp8``.
        threads: how many work on one CPU tensor, as in `exporter.codecs.encode`.

    Raises:
        EncodeError: NaN or infinity, a width that the block size does not divide, a method that the
            format does not have, an ``amax`` that is negative, not finite or of a wrong shape.
    """
    packed = fmt in ("nvfp4", "w4a16_nvfp4")
    if method == "max" or not packed:
        if method != "max":
            raise EncodeError(f"{fmt} has no calibration method {method}; use max")
        return codecs.encode(x, fmt, amax=amax, threads=threads)
    if amax is None:
        top = codecs.amax(x, fmt, threads=threads)
    else:
        top = checked_amax(amax, fmt, x.shape[:-2], x.device)
    scale_2 = top / global_divisor(method)
    scale_2 = torch.where(top == 0, torch.ones_like(scale_2), scale_2.clamp(min=2.0**-149))
    chosen = search(x, scale_2, method, threads=threads)
    return codecs.encode(x, fmt, weight_scale_2=scale_2, weight_scale=chosen, threads=threads)


def search(
    x: torch.Tensor, scale_2: torch.Tensor, method: Method, *, threads: int | None = None
) -> torch.Tensor:
    """Return the block scales of a weight or stack for its global scale, float8_e4m3fn [..., out,
    in/16].

    Args:
        x: float32, bfloat16 or float16 [..., out, in].
        scale_2: positive, float32, a scalar or [...].
        method: one of `exporter.weights.METHODS`.
        threads: how many work on one CPU tensor, as in `exporter.codecs.encode`.

    Raises:
        EncodeError: NaN or infinity in ``x``, or a width that 16 does not divide.
    """
    rows = rows_of(x, "nvfp4", NVFP4_BLOCK)
    grid = (rows.shape[0], rows.shape[1] // NVFP4_BLOCK)
    scales = torch.empty(grid, dtype=torch.float8_e4m3fn, device=x.device)

    kernels = fast.kernels(x.device) if method == "sweep" else None

    def work(chunk: Chunk, scratch: Scratch) -> None:
        values = scratch.floats(rows.read(chunk))
        shared = per_row(scale_2, chunk, x.shape)
        target = chunk.slice(scales, NVFP4_BLOCK)
        if kernels is not None:
            if not fast.finite(compiled_sweep(values, shared, target, kernels)):
                require_finite(values.abs(), values, chunk, x.shape)
            return
        maxima = block_amax(values, NVFP4_BLOCK, scratch)
        require_finite(maxima, values, chunk, x.shape)
        magnitude = torch.abs(values, out=scratch.take("wide", torch.float32, *values.shape))
        magnitude = magnitude.view(*maxima.shape, NVFP4_BLOCK)
        target.copy_(block_scales(magnitude, maxima, shared, method))

    each_chunk(rows.shape, x.device, threads, work)
    return scales.reshape(*x.shape[:-1], grid[1])
