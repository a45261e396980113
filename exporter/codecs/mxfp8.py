# SPDX-License-Identifier: Apache-2.0
"""MXFP8: E4M3 codes, an E8M0 power-of-two scale per 32 values of a row (OCP MX v1.0, section 5.2).

The exponent is the smallest that keeps the block within 448 (RCEIL), by an integer rule on the
float's bits: a float32 log2 chooses one too low just above 448 * 2^k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from exporter.codecs import fast
from exporter.codecs.blocks import (
    Chunk,
    Rows,
    Scratch,
    block_amax,
    copy_back,
    each_chunk,
    output,
    require_finite,
    require_fit,
    rows_of,
    take,
)
from exporter.codecs.constants import E4M3_MAX, E8M0_BIAS, MX_BLOCK
from exporter.codecs.tables import E8M0_NAN, e8m0_powers
from verifier.errors import EncodeError


def exponents(maxima: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 byte of each block, 0 to 254, int32: exactly ceil(log2(amax / 448)) + 127."""
    return (((maxima.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp_(0, 254)


def _power(byte: torch.Tensor) -> torch.Tensor:
    """Return 2^(127 - byte) in float32: the reciprocal of the block's scale, exact."""
    return _tables(byte.device)[2].index_select(0, byte.reshape(-1)).view(byte.shape)


def encode(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    out: dict[str, torch.Tensor] | None = None,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in].

    Args:
        x: float32, bfloat16 or float16; any stride, any device.
        weight_scale: the E8M0 bytes to use, uint8 or float8_e8m0fnu [..., out, in/32].
        out: tensors to write into, by leaf, as they are returned.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_chunk`).

    Returns:
        ``weight`` float8_e4m3fn [..., out, in], ``weight_scale`` uint8 [..., out, in/32].

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 32 does not divide, a scale of
            NaN (255), a ``weight_scale`` or ``out`` of a wrong shape or dtype.
    """
    rows = rows_of(x, "mxfp8", MX_BLOCK)
    out = out or {}
    shape = (*x.shape[:-1], x.shape[-1] // MX_BLOCK)
    code, flat_code = output(
        out.get("weight"), "mxfp8", "weight", x.shape, torch.float8_e4m3fn, x.device
    )
    scales, flat_scales = output(
        out.get("weight_scale"), "mxfp8", "weight_scale", shape, torch.uint8, x.device
    )
    fixed = None
    if weight_scale is not None:
        fixed = _checked_scales(weight_scale, shape).reshape(flat_scales.shape)
    encoder = _Mxfp8Encoder(rows, x.shape, fixed, flat_code, flat_scales, fast.kernels(x.device))
    each_chunk(rows.shape, x.device, threads, encoder.encode)
    return {"weight": code, "weight_scale": scales}


def _checked_scales(weight_scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a caller's scales as E8M0 bytes, none of them NaN."""
    require_fit(weight_scale, "mxfp8", "weight_scale", shape, torch.uint8, torch.float8_e8m0fnu)
    scales = weight_scale.view(torch.uint8)
    if bool((scales == E8M0_NAN).any()):
        raise EncodeError("mxfp8: weight_scale contains NaN (255)")
    return scales


@dataclass(frozen=True)
class _Mxfp8Encoder:
    """Encodes a weight by chunks.

    Attributes:
        rows: the weight.
        shape: of the weight, [..., out, in].
        fixed: scale bytes to use, uint8 [rows, in/32]; None derives them.
        codes: where the codes go, float8_e4m3fn [rows, in].
        scales: where the scale bytes go, uint8 [rows, in/32].
        kernels: the compiled back end; None encodes with torch.
    """

    rows: Rows
    shape: torch.Size
    fixed: torch.Tensor | None
    codes: torch.Tensor
    scales: torch.Tensor
    kernels: Any

    def encode(self, chunk: Chunk, scratch: Scratch) -> None:
        """Write the codes and scales of a chunk."""
        values = scratch.floats(self.rows.read(chunk))
        if self.kernels is not None:
            self._compiled(values, chunk, scratch)
            return
        maxima = block_amax(values, MX_BLOCK, scratch)
        require_finite(maxima, values, chunk, self.shape)
        if self.fixed is None:
            byte = exponents(maxima)
        else:
            byte = chunk.slice(self.fixed, MX_BLOCK).to(torch.int32)
        chunk.slice(self.scales, MX_BLOCK).copy_(byte)
        quotient = scratch.take("wide", torch.float32, *values.shape)
        grid = (*byte.shape, MX_BLOCK)
        torch.mul(values.view(grid), _power(byte).unsqueeze(-1), out=quotient.view(grid))
        if self.fixed is not None:  # derived scales let no value exceed 448
            quotient.clamp_(-E4M3_MAX, E4M3_MAX)
        chunk.slice(self.codes).copy_(quotient)

    def _compiled(self, values: torch.Tensor, chunk: Chunk, scratch: Scratch) -> None:
        codes, scales = chunk.slice(self.codes), chunk.slice(self.scales, MX_BLOCK)
        codes_buffer = scratch.contiguous("codes", codes)
        scales_buffer = scratch.contiguous("scales", scales)
        if self.fixed is not None:
            scales_buffer.copy_(chunk.slice(self.fixed, MX_BLOCK))
        array = fast.array(values)
        largest = self.kernels.mxfp8_encode(
            array,
            array.view("int32"),
            self.fixed is not None,
            fast.array(_tables(values.device)[2]),
            fast.array(scales_buffer),
            fast.array(codes_buffer),
        )
        if not fast.finite(largest):
            require_finite(values.abs(), values, chunk, self.shape)
        copy_back(codes_buffer, codes)
        copy_back(scales_buffer, scales)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    every = torch.arange(256, dtype=torch.uint8)
    codes = every.view(torch.float8_e4m3fn).float()
    inverse = torch.ldexp(torch.ones(256), E8M0_BIAS - torch.arange(256))
    return codes.to(device), e8m0_powers().to(device), inverse.to(device)


def e4m3_values(code: torch.Tensor, scratch: Scratch, values: torch.Tensor) -> None:
    """Write the values of E4M3 bytes, uint8, to contiguous float32 of the same shape.

    Shifted by seven, and its sign by eight, a code is the float16 of 2^-8 times its value, except
    for the NaN codes.
    """
    if code.numel() and (code & 0x7F).amax() == 0x7F:
        codes = _tables(code.device)[0]
        values.copy_(codes.index_select(0, code.to(torch.int32).reshape(-1)).view(code.shape))
        return
    bits = scratch.take("bits", torch.int16, *code.shape).copy_(code.view(torch.int8))
    half = bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)
    values.copy_(half).mul_(256.0)


def decode(
    parts: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return ``code * 2^(scale - 127)`` in float32, cast to ``dtype``; [..., out, in].

    The last block of a row may be incomplete.

    Args:
        parts: ``weight`` float8_e4m3fn [..., out, in] and ``weight_scale`` (or
            ``weight_scale_inv``) float8_e8m0fnu [..., out, ceil(in/32)], or their bytes as uint8.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_chunk`).

    Raises:
        EncodeError: a missing part, parts or an ``out`` that do not fit.
    """
    leaves = ("weight_scale", "weight_scale_inv")
    code = take(parts, "mxfp8", ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale = take(parts, "mxfp8", leaves, torch.uint8, torch.float8_e8m0fnu).view(torch.uint8)
    width = code.shape[-1]
    require_fit(scale, "mxfp8", "weight_scale", (*code.shape[:-1], -(-width // MX_BLOCK)))
    result, flat = output(out, "mxfp8", "out", code.shape, dtype, code.device)
    code_rows, scale_rows = Rows(code), Rows(scale)
    powers = _tables(code.device)[1]
    kernels = fast.kernels(code.device)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        target = chunk.slice(flat)
        values = scratch.contiguous("values", target, torch.float32)
        stored, scales = code_rows.read(chunk), scale_rows.read(chunk.scaled(MX_BLOCK))
        if kernels is not None:
            inputs = (stored.contiguous(), scales.contiguous(), powers, values)
            kernels.mxfp8_decode(*map(fast.array, inputs))
            copy_back(values, target)
            return
        e4m3_values(stored, scratch, values)
        factor = powers.index_select(0, scales.to(torch.int32).reshape(-1)).view(scales.shape)
        if values.shape[1] % MX_BLOCK:
            values.mul_(factor.repeat_interleave(MX_BLOCK, dim=1)[:, : values.shape[1]])
        else:
            values.view(*factor.shape, MX_BLOCK).mul_(factor.unsqueeze(-1))
        copy_back(values, target)

    each_chunk((flat.shape[0], flat.shape[1]), code.device, threads, work)
    return result
