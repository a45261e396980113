# SPDX-License-Identifier: Apache-2.0
"""MXFP8: E4M3 codes, an E8M0 power-of-two scale for each 32 of a row (OCP MX v1.0, section 5.2).

The exponent is the smallest that keeps the block within 448 (RCEIL), by an integer rule on the
float's bits: a float32 log2 chooses one too low just above 448 * 2^k.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from exporter.codecs import fast
from exporter.codecs.blocks import (
    Part,
    Rows,
    Scratch,
    block_amax,
    each_part,
    require_finite,
    require_fit,
    rows_of,
    settle,
    take,
    target,
)
from exporter.codecs.constants import E4M3_MAX, E8M0_BIAS, MX_BLOCK
from exporter.codecs.tables import E8M0_NAN, e8m0_powers
from verifier.errors import EncodeError


def exponents(maxima: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 byte of each block, 0 to 254, int32: ceil(log2(amax / 448)) + 127,
    exactly.
    """
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
        weight_scale: the E8M0 bytes themselves, uint8 or float8_e8m0fnu [..., out, in/32].
        out: tensors to write into, by leaf, as they are returned.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_part`).

    Returns:
        ``weight`` float8_e4m3fn [..., out, in], ``weight_scale`` uint8 [..., out, in/32].

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 32 does not divide, a scale of
            NaN (255), a ``weight_scale`` or ``out`` of another shape or dtype.
    """
    rows = rows_of(x, "mxfp8", MX_BLOCK)
    out = out or {}
    shape = (*x.shape[:-1], x.shape[-1] // MX_BLOCK)
    code, flat_code = target(
        out.get("weight"), "mxfp8", "weight", x.shape, torch.float8_e4m3fn, x.device
    )
    scales, flat_scales = target(
        out.get("weight_scale"), "mxfp8", "weight_scale", shape, torch.uint8, x.device
    )
    given = None
    if weight_scale is not None:
        require_fit(weight_scale, "mxfp8", "weight_scale", shape, torch.uint8, torch.float8_e8m0fnu)
        given = weight_scale.view(torch.uint8).reshape(flat_scales.shape)
        if bool((given == E8M0_NAN).any()):
            raise EncodeError("mxfp8: the given weight_scale holds NaN (255)")

    compiled = fast.kernels(x.device)

    def work(part: Part, scratch: Scratch) -> None:
        values = scratch.floats(rows.of(part))
        if compiled is not None:
            into, into_scales = part.of(flat_code), part.of(flat_scales, MX_BLOCK)
            done, done_scales = scratch.place("codes", into), scratch.place("scales", into_scales)
            if given is not None:
                done_scales.copy_(part.of(given, MX_BLOCK))
            plain, inverse = fast.array(values), fast.array(_tables(x.device)[2])
            arrays = fast.array(done_scales), fast.array(done)
            worst = compiled.mxfp8_encode(
                plain, plain.view("int32"), given is not None, inverse, *arrays
            )
            if not fast.finite(worst):
                require_finite(values.abs(), values, part, x.shape)
            settle(done, into)
            settle(done_scales, into_scales)
            return
        maxima = block_amax(values, MX_BLOCK, scratch)
        require_finite(maxima, values, part, x.shape)
        byte = exponents(maxima) if given is None else part.of(given, MX_BLOCK).to(torch.int32)
        part.of(flat_scales, MX_BLOCK).copy_(byte)
        quotient, grid = scratch.take("wide", torch.float32, *values.shape), (*byte.shape, MX_BLOCK)
        torch.mul(values.view(grid), _power(byte).unsqueeze(-1), out=quotient.view(grid))
        if given is not None:  # else nothing exceeds 448
            quotient.clamp_(-E4M3_MAX, E4M3_MAX)
        part.of(flat_code).copy_(quotient)

    each_part(rows.shape, x.device, threads, work)
    return {"weight": code, "weight_scale": scales}


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    every = torch.arange(256, dtype=torch.uint8)
    codes = every.view(torch.float8_e4m3fn).float()
    inverse = torch.ldexp(torch.ones(256), E8M0_BIAS - torch.arange(256))
    return codes.to(device), e8m0_powers().to(device), inverse.to(device)


def values_of(code: torch.Tensor, scratch: Scratch, into: torch.Tensor) -> None:
    """Write the values of E4M3 bytes, uint8, to contiguous float32 of the same shape.

    Shifted by seven, and its sign by eight, a code is the float16 of 2^-8 times its value; but the
    NaN codes are not.
    """
    if code.numel() and (code & 0x7F).amax() == 0x7F:
        codes = _tables(code.device)[0]
        into.copy_(codes.index_select(0, code.to(torch.int32).reshape(-1)).view(code.shape))
        return
    bits = scratch.take("bits", torch.int16, *code.shape).copy_(code.view(torch.int8))
    into.copy_(bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)).mul_(256.0)


def decode(
    parts: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return ``code * 2^(scale - 127)`` in float32, cast to ``dtype``; a ragged last block is read,
    [..., out, in].

    Args:
        parts: ``weight`` float8_e4m3fn [..., out, in] and ``weight_scale`` (or
            ``weight_scale_inv``) float8_e8m0fnu [..., out, ceil(in/32)], or their bytes as uint8.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_part`).

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    code = take(parts, "mxfp8", ("weight",), torch.uint8, torch.float8_e4m3fn).view(torch.uint8)
    scale = take(
        parts, "mxfp8", ("weight_scale", "weight_scale_inv"), torch.uint8, torch.float8_e8m0fnu
    ).view(torch.uint8)
    width = code.shape[-1]
    require_fit(scale, "mxfp8", "weight_scale", (*code.shape[:-1], -(-width // MX_BLOCK)))
    result, flat = target(out, "mxfp8", "out", code.shape, dtype, code.device)
    flat_code, flat_scale = Rows(code), Rows(scale)
    powers = _tables(code.device)[1]
    compiled = fast.kernels(code.device)

    def work(part: Part, scratch: Scratch) -> None:
        stored, bytes_ = flat_code.of(part), flat_scale.of(part.scaled(MX_BLOCK))
        into = part.of(flat)
        values = scratch.place("values", into, torch.float32)
        if compiled is not None:
            compiled.mxfp8_decode(
                *(fast.array(t) for t in (stored.contiguous(), bytes_.contiguous(), powers, values))
            )
            settle(values, into)
            return
        values_of(stored, scratch, values)
        factor = powers.index_select(0, bytes_.to(torch.int32).reshape(-1)).view(bytes_.shape)
        if values.shape[1] % MX_BLOCK:
            values.mul_(factor.repeat_interleave(MX_BLOCK, dim=1)[:, : values.shape[1]])
        else:
            values.view(*factor.shape, MX_BLOCK).mul_(factor.unsqueeze(-1))
        settle(values, into)

    each_part((flat.shape[0], flat.shape[1]), code.device, threads, work)
    return result
