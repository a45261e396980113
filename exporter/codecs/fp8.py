# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 with float32 scales per tensor, per row, or per 128x128 tile (DeepSeek-V3, 3.3)."""

from __future__ import annotations

import threading

import torch

from exporter.codecs.blocks import (
    FLOATS,
    Chunk,
    Rows,
    Scratch,
    checked_amax,
    copy_back,
    each_chunk,
    matrix_of,
    output,
    per_row,
    require_finite,
    require_positive,
    rows_of,
    take,
)
from exporter.codecs.constants import E4M3_MAX, FP8_TILE
from exporter.codecs.mxfp8 import e4m3_values
from verifier.errors import EncodeError

SCALE_LEAF = {
    "fp8": "weight_scale",
    "fp8_per_channel": "weight_scale",
    "fp8_block": "weight_scale_inv",
}


def encode(
    x: torch.Tensor,
    fmt: str,
    *,
    amax: torch.Tensor | float | None = None,
    weight_scale: torch.Tensor | None = None,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in] as E4M3 with float32 scales.

    Args:
        x: float32, bfloat16 or float16.
        fmt: ``fp8`` (scale [...]), ``fp8_per_channel`` ([..., out]) or ``fp8_block`` ([...,
            out/128, in/128], ceil).
        amax: the maximum to derive the scale from, in the scale's shape or a scalar.
        weight_scale: the scale to use, with more or fewer axes of length 1; for ``fp8``, one for
            all matrices is enough.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_chunk`).

    Returns:
        ``weight`` float8_e4m3fn [..., out, in]; ``weight_scale`` (``weight_scale_inv`` for
        ``fp8_block``) float32.

    Raises:
        EncodeError: NaN or infinity in ``x``, an ``amax`` or ``weight_scale`` of a wrong shape, an
            ``amax`` that is negative or not finite, a ``weight_scale`` that is not positive and
            finite.
    """
    rows = rows_of(x, fmt, 1)
    if weight_scale is None:
        scale = _scale_of(x, fmt, amax, threads)
    else:
        scale = _reshaped(weight_scale.detach().float(), fmt, x.shape).contiguous()
        require_positive(scale, fmt, "weight_scale")
    code = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    flat = code.view(rows.shape)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        values = scratch.floats(rows.read(chunk))
        require_finite(torch.stack(torch.aminmax(values)).abs_(), values, chunk, x.shape)
        quotient = scratch.take("wide", torch.float32, *values.shape)
        torch.div(values, _broadcast(scale, fmt, chunk, x.shape), out=quotient)
        chunk.slice(flat).copy_(quotient.clamp_(-E4M3_MAX, E4M3_MAX))

    each_chunk(rows.shape, x.device, threads, work)
    return {"weight": code, SCALE_LEAF[fmt]: scale}


def _scale_of(
    x: torch.Tensor, fmt: str, amax: torch.Tensor | float | None, threads: int | None
) -> torch.Tensor:
    """Return the scale that maps the maximum to 448; 1.0 for zeros."""
    if amax is None:
        top = _amax(x, fmt, threads)
    else:
        shape = _scale_shape(fmt, x.shape)
        top = checked_amax(amax, fmt, shape, x.device).expand(shape)
    scale = top / E4M3_MAX
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _scale_shape(fmt: str, shape: torch.Size) -> torch.Size:
    if fmt == "fp8":
        return shape[:-2]
    if fmt == "fp8_per_channel":
        return shape[:-1]
    return torch.Size((*shape[:-2], -(-shape[-2] // FP8_TILE), -(-shape[-1] // FP8_TILE)))


def _reshaped(scale: torch.Tensor, fmt: str, shape: torch.Size) -> torch.Tensor:
    """Return a scale in the shape for weights of ``shape``; on disk it may have more or fewer axes
    of length 1.
    """
    expected = _scale_shape(fmt, shape)
    if fmt == "fp8" and scale.numel() == 1:
        return scale.reshape(()).expand(expected)
    if [n for n in scale.shape if n != 1] != [n for n in expected if n != 1]:
        raise EncodeError(f"{fmt}: scale has shape {list(scale.shape)}; expected {list(expected)}")
    return scale.reshape(expected)


def _amax(x: torch.Tensor, fmt: str, threads: int | None) -> torch.Tensor:
    """Return the maxima to derive scales from, in the scale's shape."""
    shape = _scale_shape(fmt, x.shape)
    rows, lock = Rows(x), threading.Lock()
    table = (shape[:-1].numel(), shape[-1]) if fmt == "fp8_block" else (shape.numel(), 1)
    maxima = torch.zeros(table, dtype=torch.float32, device=x.device)

    def work(chunk: Chunk, _: Scratch) -> None:
        values = rows.read(chunk)
        require_finite(torch.stack(torch.aminmax(values)).abs_(), values, chunk, x.shape)
        if fmt == "fp8_block":
            padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % FP8_TILE))
            top = padded.view(values.shape[0], -1, FP8_TILE).amax(-1).float()
        else:
            top = values.abs().amax(-1, keepdim=True).float()
        index = _scale_rows(fmt, chunk, x.shape, x.device)
        first = chunk.left // FP8_TILE if fmt == "fp8_block" else 0
        with lock:
            target = maxima[:, first : first + top.shape[1]]
            target.scatter_reduce_(0, index.unsqueeze(-1).expand_as(top), top, "amax")

    each_chunk(rows.shape, x.device, threads, work)
    return maxima.view(shape)


def _scale_rows(fmt: str, chunk: Chunk, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return the row of scales that applies to each row of a chunk, int64 [rows]."""
    matrix = matrix_of(chunk, shape, device)
    if fmt == "fp8":
        return matrix
    row = torch.arange(chunk.start, chunk.stop, device=device)
    if fmt == "fp8_per_channel":
        return row
    return matrix * -(-shape[-2] // FP8_TILE) + (row - matrix * shape[-2]) // FP8_TILE


def _broadcast(scale: torch.Tensor, fmt: str, chunk: Chunk, shape: torch.Size) -> torch.Tensor:
    """Return the scales of a chunk of a weight of ``shape``, broadcastable over its values."""
    if fmt == "fp8":
        return per_row(scale, chunk, shape)
    index = _scale_rows(fmt, chunk, shape, scale.device)
    if fmt == "fp8_per_channel":
        return scale.reshape(-1, 1).index_select(0, index)
    table = scale.reshape(-1, scale.shape[-1])
    columns = table[:, chunk.left // FP8_TILE : -(-chunk.right // FP8_TILE)]
    tiles = columns.index_select(0, index)
    return tiles.repeat_interleave(FP8_TILE, -1)[:, : chunk.right - chunk.left]


def decode(
    parts: dict[str, torch.Tensor],
    fmt: str,
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return ``code * scale`` in float32, cast to ``dtype``; [..., out, in].

    Args:
        parts: ``weight`` float8_e4m3fn [..., out, in], or its bytes as uint8, and ``weight_scale``
            (or ``weight_scale_inv``) as `encode` takes it.
        fmt: ``fp8``, ``fp8_per_channel`` or ``fp8_block``.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_chunk`).

    Raises:
        EncodeError: a missing part, parts or an ``out`` that do not fit.
    """
    code = take(parts, fmt, ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale = take(parts, fmt, ("weight_scale", "weight_scale_inv"), *FLOATS)
    scale = _reshaped(scale.detach().float(), fmt, code.shape)
    result, flat = output(out, fmt, "out", code.shape, dtype, code.device)
    rows = Rows(code)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        target = chunk.slice(flat)
        values = scratch.contiguous("values", target, torch.float32)
        e4m3_values(rows.read(chunk), scratch, values)
        values.mul_(_broadcast(scale, fmt, chunk, code.shape))
        copy_back(values, target)

    each_chunk(rows.shape, code.device, threads, work)
    return result
