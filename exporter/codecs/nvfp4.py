# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 codes, an E4M3 scale per 16 values of a row, a float32 scale per tensor.

Byte for byte what ModelOpt 0.47 packs for finite input that is not all zero; an all-zero tensor has
a defined result here (codes 0, block scales 1.0, ``weight_scale_2`` 1.0) where ModelOpt writes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from exporter.codecs import fast
from exporter.codecs.blocks import (
    FLOATS,
    Chunk,
    Rows,
    Scratch,
    block_amax,
    checked_amax,
    copy_back,
    each_chunk,
    output,
    per_row,
    require_finite,
    require_fit,
    require_positive,
    rows_of,
    scalar_or,
    take,
    tensor_amax,
)
from exporter.codecs.constants import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE, SCALE_FLOOR
from exporter.codecs.tables import e2m1_pairs
from verifier.errors import EncodeError

_EXPONENT = 0x7F800000
_ONE = 0x3F800000
_MAGIC = (22 << 23) + (1 << 22)
"""Added to the bits of 2^k, gives those of 1.5 * 2^(22 + k)."""


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Return ``weight_scale_2`` = amax / 2688 in float32: 1.0 where amax is zero, else at least the
    smallest subnormal.
    """
    scale = amax.float() / NVFP4_RANGE
    scale = torch.where((scale == 0) & (amax > 0), torch.full_like(scale, 2.0**-149), scale)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def encode(
    x: torch.Tensor,
    *,
    amax: torch.Tensor | float | None = None,
    weight_scale_2: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out: dict[str, torch.Tensor] | None = None,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Encode weights [..., out, in] (float32, bfloat16, float16; any stride, any device).

    Args:
        x: the weights; a stack is encoded in one call, each matrix with its own global scale.
        amax: the maximum to derive ``weight_scale_2`` from, shared by a fused group or a stack: a
            scalar, or [...].
        weight_scale_2: the global scale to use, float32, a scalar or [...]; not with ``amax``.
        weight_scale: the block scales to use, float8_e4m3fn or its bytes as uint8, [..., out,
            in/16]; needs ``weight_scale_2``.
        out: tensors to write into, by leaf, as they are returned.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_chunk`).

    Returns:
        ``weight`` uint8 [..., out, in/2] (even column in the low nibble), ``weight_scale``
        float8_e4m3fn [..., out, in/16], ``weight_scale_2`` float32 [...] (a scalar if a scalar was
        passed).

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 16 does not divide, arguments
            that contradict each other, a scale that is not positive and finite, an argument of a
            wrong shape or dtype.
    """
    rows = rows_of(x, "nvfp4", NVFP4_BLOCK)
    scale_2 = _global_scale(x, amax, weight_scale_2, weight_scale, threads)
    out = out or {}
    lead, width = x.shape[:-1], x.shape[-1]
    grid = (*lead, width // NVFP4_BLOCK)
    packed, flat_packed = output(
        out.get("weight"), "nvfp4", "weight", (*lead, width // 2), torch.uint8, x.device
    )
    scales, flat_scales = output(
        out.get("weight_scale"), "nvfp4", "weight_scale", grid, torch.float8_e4m3fn, x.device
    )
    fixed = None
    if weight_scale is not None:
        fixed = _checked_scales(weight_scale, grid).reshape(flat_scales.shape)
    if "weight_scale_2" in out:
        require_fit(out["weight_scale_2"], "nvfp4", "weight_scale_2", scale_2.shape, torch.float32)
        scale_2 = out["weight_scale_2"].copy_(scale_2)
    encoder = _Nvfp4Encoder(
        rows, x.shape, scale_2, fixed, flat_packed, flat_scales, fast.kernels(x.device)
    )
    each_chunk(rows.shape, x.device, threads, encoder.encode)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2}


def _global_scale(
    x: torch.Tensor,
    amax: torch.Tensor | float | None,
    weight_scale_2: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    threads: int | None,
) -> torch.Tensor:
    if weight_scale_2 is not None:
        if amax is not None:
            raise EncodeError("nvfp4: pass amax or weight_scale_2, not both")
        scale_2 = scalar_or(weight_scale_2.float(), "nvfp4", "weight_scale_2", x.shape[:-2])
        require_positive(scale_2, "nvfp4", "weight_scale_2")
        return scale_2
    if weight_scale is not None:
        raise EncodeError("nvfp4: weight_scale needs the weight_scale_2 that it is relative to")
    if amax is None:
        return global_scale(tensor_amax(x, "nvfp4", NVFP4_BLOCK, threads))
    return global_scale(checked_amax(amax, "nvfp4", x.shape[:-2], x.device))


def _checked_scales(weight_scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a caller's block scales as float8_e4m3fn, all of them positive numbers."""
    require_fit(weight_scale, "nvfp4", "weight_scale", shape, torch.float8_e4m3fn, torch.uint8)
    scales = weight_scale.view(torch.float8_e4m3fn)
    require_positive(scales.float(), "nvfp4", "weight_scale")
    return scales


@dataclass(frozen=True)
class _Nvfp4Encoder:
    """Encodes a weight by chunks.

    Attributes:
        rows: the weight.
        shape: of the weight, [..., out, in].
        scale_2: the global scale, a scalar or [...].
        fixed: block scales to use, float8_e4m3fn [rows, in/16]; None derives them.
        packed: where the codes go, uint8 [rows, in/2].
        scales: where the block scales go, float8_e4m3fn [rows, in/16].
        kernels: the compiled back end; None encodes with torch.
    """

    rows: Rows
    shape: torch.Size
    scale_2: torch.Tensor
    fixed: torch.Tensor | None
    packed: torch.Tensor
    scales: torch.Tensor
    kernels: Any

    def encode(self, chunk: Chunk, scratch: Scratch) -> None:
        """Write the codes and block scales of a chunk."""
        values = scratch.floats(self.rows.read(chunk))
        scale_2 = per_row(self.scale_2, chunk, self.shape)
        if self.kernels is not None:
            self._compiled(values, scale_2, chunk, scratch)
            return
        maxima = block_amax(values, NVFP4_BLOCK, scratch)
        require_finite(maxima, values, chunk, self.shape)
        if self.fixed is None:
            scales = block_scales(maxima, scale_2)
        else:
            scales = chunk.slice(self.fixed, NVFP4_BLOCK)
        chunk.slice(self.scales, NVFP4_BLOCK).copy_(scales)
        combined = scale_values(scales).mul_(scale_2)
        chunk.slice(self.packed, 2).copy_(pack(codes(values, combined, scratch), scratch))

    def _compiled(
        self, values: torch.Tensor, scale_2: torch.Tensor, chunk: Chunk, scratch: Scratch
    ) -> None:
        packed, scales = chunk.slice(self.packed, 2), chunk.slice(self.scales, NVFP4_BLOCK)
        packed_buffer = scratch.contiguous("packed", packed)
        scales_buffer = scratch.contiguous("scales", scales)
        if self.fixed is not None:
            scales_buffer.copy_(chunk.slice(self.fixed, NVFP4_BLOCK))
        array = fast.array(values)
        largest = self.kernels.nvfp4_encode(
            array,
            array.view("int32"),
            fast.array(scale_2.view(-1)),
            self.fixed is not None,
            fast.array(_tables(values.device)[1]),
            fast.array(scales_buffer),
            fast.array(packed_buffer),
        )
        if not fast.finite(largest):
            require_finite(values.abs(), values, chunk, self.shape)
        copy_back(packed_buffer, packed)
        copy_back(scales_buffer, scales)


def block_scales(maxima: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of each block from its maximum and the global scale; 1.0 for a zero
    block.
    """
    quotient = maxima / (E2M1_MAX * scale_2)
    # A block of zeros, or so far below its tensor's maximum that the quotient underflows: all its
    # values become zero, whatever the scale.
    zero = quotient == 0 if quotient.numel() and quotient.amin() == 0 else None
    quotient.clamp_(SCALE_FLOOR, E4M3_MAX)
    if zero is not None:
        quotient.masked_fill_(zero, 1.0)
    return quotient.to(torch.float8_e4m3fn)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Return E4M3 scales as float32, by look-up: on a CPU, torch converts them one at a time."""
    index = scales.view(torch.uint8).to(torch.int32).reshape(-1)
    return _tables(scales.device)[1].index_select(0, index).view(scales.shape)


def codes(values: torch.Tensor, combined: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return the E2M1 codes nearest to values / scale, ties to the even code, int16 [rows, in] in
    scratch.

    Args:
        values: contiguous float32 [rows, in].
        combined: ``weight_scale * weight_scale_2``, float32 [rows, in/16].
        scratch: where to work; its "wide" is written.
    """
    shape = values.shape
    quotient = scratch.take("wide", torch.float32, *shape)
    grid = (*combined.shape, NVFP4_BLOCK)
    torch.div(values.view(grid), combined.unsqueeze(-1), out=quotient.view(grid))
    # Scales of a caller may be so small that their product is 0: 0/0 is code 0.
    if combined.numel() and combined.amin() == 0:
        quotient.masked_fill_(quotient.isnan(), 0.0)
    quotient.add_(0.0).clamp_(-E2M1_MAX, E2M1_MAX)  # -0.0 + 0.0 has no sign
    # A negative value that rounds to zero keeps its sign.
    sign = scratch.take("sign", torch.float16, *shape).copy_(quotient).view(torch.int16)
    # Adding 1.5 * 2^(22 + k), and subtracting it again, leaves a unit in the last place of 2^(k-1):
    # the E2M1 step in the value's binade, or half of it below 1.
    magic = torch.bitwise_and(
        quotient.view(torch.int32), _EXPONENT, out=scratch.take("magic", torch.int32, *shape)
    )
    constant = magic.clamp_(min=_ONE).add_(_MAGIC).view(torch.float32)
    rounded = quotient.add_(constant).sub_(constant)
    # Times 2^-14 the eight magnitudes are float16's subnormals and first binades, whose upper bits
    # count as E2M1 does.
    half = scratch.take("half", torch.float16, *shape).copy_(rounded.mul_(2.0**-14))
    magnitude = half.view(torch.int16).bitwise_right_shift_(9).bitwise_and_(7)
    return magnitude.bitwise_or_(sign.bitwise_right_shift_(12).bitwise_and_(8))


def pack(code: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return two codes per byte, the even column in the low nibble, as the low byte of int32 [rows,
    in/2].

    Args:
        code: int16 [rows, in], 0 to 15, contiguous; overwritten.
        scratch: where to work.
    """
    pairs = code.view(torch.int32)
    odd = scratch.take("pairs", torch.int32, *pairs.shape)
    torch.bitwise_right_shift(pairs, 12, out=odd)
    return pairs.bitwise_or_(odd)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two values of each packed byte, float16 pairs as int32, and the value of each E4M3
    byte, float32.
    """
    pairs = e2m1_pairs().to(torch.float16).view(torch.int32).reshape(256)
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return pairs.to(device), scale.to(device)


def decode(
    parts: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return ``(weight_scale * weight_scale_2) * code`` in float32, cast to ``dtype``; [..., out,
    in].

    Args:
        parts: the tensors that `encode` returns; ``weight_scale`` may be uint8, ``weight_scale_2``
            a scalar or [1].
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_chunk`).

    Raises:
        EncodeError: a missing part, parts or an ``out`` that do not fit.
    """
    packed = take(parts, "nvfp4", ("weight",), torch.uint8)
    scale = take(parts, "nvfp4", ("weight_scale",), torch.uint8, torch.float8_e4m3fn)
    scale_2 = take(parts, "nvfp4", ("weight_scale_2",), *FLOATS)
    scale_2 = scalar_or(scale_2, "nvfp4", "weight_scale_2", packed.shape[:-2])
    shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))
    if scale.shape != (*shape[:-1], shape[-1] // NVFP4_BLOCK) or shape[-1] % NVFP4_BLOCK:
        raise EncodeError(
            f"nvfp4: weight_scale {list(scale.shape)} does not fit a weight of {list(shape)}"
        )
    result, flat = output(out, "nvfp4", "out", shape, dtype, packed.device)
    packed_rows, scale_rows = Rows(packed), Rows(scale.view(torch.uint8))
    kernels = fast.kernels(packed.device)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        target = chunk.slice(flat)
        values = scratch.contiguous("values", target, torch.float32)
        stored = packed_rows.read(chunk.scaled(2))
        scales = scale_rows.read(chunk.scaled(NVFP4_BLOCK))
        wide = per_row(scale_2, chunk, shape)
        if kernels is not None:
            table = _tables(packed.device)[1]
            inputs = (stored.contiguous(), scales.contiguous(), wide.view(-1), table, values)
            kernels.nvfp4_decode(*map(fast.array, inputs))
        else:
            unpack(stored, scratch, values)
            combined = scale_values(scales).mul_(wide)
            values.view(*combined.shape, NVFP4_BLOCK).mul_(combined.unsqueeze(-1))
        copy_back(values, target)

    each_chunk((flat.shape[0], flat.shape[1]), packed.device, threads, work)
    return result


def unpack(packed: torch.Tensor, scratch: Scratch, values: torch.Tensor) -> None:
    """Write the values of packed bytes, uint8 [rows, in/2], to contiguous float32 [rows, in]."""
    index = scratch.take("index", torch.int32, *packed.shape).copy_(packed)
    pairs = scratch.take("pairs", torch.int32, index.numel())
    torch.index_select(_tables(packed.device)[0], 0, index.view(-1), out=pairs)
    values.copy_(pairs.view(torch.float16).view(values.shape))
