# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 with float32 scales: one a tensor, one a row, or one for each 128x128 tile (DeepSeek-V3,
section 3.3).
"""

from __future__ import annotations

import threading

import torch

from exporter.codecs.blocks import (
    FLOATS,
    Part,
    Rows,
    Scratch,
    each_part,
    given_amax,
    matrix_of,
    per_row,
    require_finite,
    require_positive,
    rows_of,
    settle,
    take,
    target,
)
from exporter.codecs.constants import E4M3_MAX, FP8_TILE
from exporter.codecs.mxfp8 import values_of
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
        weight_scale: the scale itself, its axes of length 1 more or fewer; for ``fp8`` one for all
            will do.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_part`).

    Returns:
        ``weight`` float8_e4m3fn [..., out, in]; ``weight_scale`` (``weight_scale_inv`` for
        ``fp8_block``) float32.

    Raises:
        EncodeError: NaN or infinity in ``x``, an ``amax`` or ``weight_scale`` of another shape, an
            ``amax`` that is negative or not finite, a ``weight_scale`` that is not positive and
            finite.
    """
    rows = rows_of(x, fmt, 1)
    if weight_scale is None:
        shape = _scale_shape(fmt, x.shape)
        top = (
            _amax(x, fmt, threads)
            if amax is None
            else given_amax(amax, fmt, shape, x.device).expand(shape)
        )
        scale = top / E4M3_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = _fitted(weight_scale.detach().float(), fmt, x.shape).contiguous()
        require_positive(scale, fmt, "weight_scale")
    code = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    flat = code.view(rows.shape)

    def work(part: Part, scratch: Scratch) -> None:
        values = scratch.floats(rows.of(part))
        require_finite(torch.stack(torch.aminmax(values)).abs_(), values, part, x.shape)
        quotient = scratch.take("wide", torch.float32, *values.shape)
        torch.div(values, _wide(scale, fmt, part, x.shape), out=quotient)
        part.of(flat).copy_(quotient.clamp_(-E4M3_MAX, E4M3_MAX))

    each_part(rows.shape, x.device, threads, work)
    return {"weight": code, SCALE_LEAF[fmt]: scale}


def _scale_shape(fmt: str, shape: torch.Size) -> tuple[int, ...]:
    if fmt == "fp8":
        return tuple(shape[:-2])
    if fmt == "fp8_per_channel":
        return tuple(shape[:-1])
    return (*shape[:-2], -(-shape[-2] // FP8_TILE), -(-shape[-1] // FP8_TILE))


def _fitted(scale: torch.Tensor, fmt: str, shape: torch.Size) -> torch.Tensor:
    """Return a scale in the shape for weights of ``shape``; on disk it may have more axes of length
    1, or fewer.
    """
    wanted = _scale_shape(fmt, shape)
    if fmt == "fp8" and scale.numel() == 1:
        return scale.reshape(()).expand(wanted)
    if [n for n in scale.shape if n != 1] != [n for n in wanted if n != 1]:
        raise EncodeError(
            f"{fmt}: a scale of shape {list(scale.shape)}; {list(wanted)} belongs here"
        )
    return scale.reshape(wanted)


def _amax(x: torch.Tensor, fmt: str, threads: int | None) -> torch.Tensor:
    """Return the maxima that scales are derived from, in their shape."""
    shape = _scale_shape(fmt, x.shape)
    rows, lock = Rows(x), threading.Lock()
    table = (
        (torch.Size(shape[:-1]).numel(), shape[-1])
        if fmt == "fp8_block"
        else (torch.Size(shape).numel(), 1)
    )
    maxima = torch.zeros(table, dtype=torch.float32, device=x.device)

    def work(part: Part, _: Scratch) -> None:
        values = rows.of(part)
        require_finite(torch.stack(torch.aminmax(values)).abs_(), values, part, x.shape)
        if fmt == "fp8_block":
            size = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % FP8_TILE))
            top = size.view(values.shape[0], -1, FP8_TILE).amax(-1).float()
        else:
            top = values.abs().amax(-1, keepdim=True).float()
        place = _place(fmt, part, x.shape, x.device)
        first = part.left // FP8_TILE if fmt == "fp8_block" else 0
        with lock:
            into = maxima[:, first : first + top.shape[1]]
            into.scatter_reduce_(0, place.unsqueeze(-1).expand_as(top), top, "amax")

    each_part(rows.shape, x.device, threads, work)
    return maxima.view(shape)


def _place(fmt: str, part: Part, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return which row of scales each row of a part takes, int64 [rows]."""
    matrix = matrix_of(part, shape, device)
    if fmt == "fp8":
        return matrix
    row = torch.arange(part.start, part.stop, device=device)
    if fmt == "fp8_per_channel":
        return row
    return matrix * -(-shape[-2] // FP8_TILE) + (row - matrix * shape[-2]) // FP8_TILE


def _wide(scale: torch.Tensor, fmt: str, part: Part, shape: torch.Size) -> torch.Tensor:
    """Return a scale of `_scale_shape` such that it broadcasts over a part of weights of
    ``shape``.
    """
    if fmt == "fp8":
        return per_row(scale, part, shape)
    place = _place(fmt, part, shape, scale.device)
    if fmt == "fp8_per_channel":
        return scale.reshape(-1, 1).index_select(0, place)
    tiles = scale.reshape(-1, scale.shape[-1])[
        :, part.left // FP8_TILE : -(-part.right // FP8_TILE)
    ].index_select(0, place)
    return tiles.repeat_interleave(FP8_TILE, -1)[:, : part.right - part.left]


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
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_part`).

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    code = take(parts, fmt, ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale = _fitted(
        take(parts, fmt, ("weight_scale", "weight_scale_inv"), *FLOATS).detach().float(),
        fmt,
        code.shape,
    )
    result, flat = target(out, fmt, "out", code.shape, dtype, code.device)
    rows = Rows(code)

    def work(part: Part, scratch: Scratch) -> None:
        into = part.of(flat)
        values = scratch.place("values", into, torch.float32)
        values_of(rows.of(part), scratch, values)
        values.mul_(_wide(scale, fmt, part, code.shape))
        settle(values, into)

    each_part(rows.shape, code.device, threads, work)
    return result
