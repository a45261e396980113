# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 codes, an E4M3 scale for each 16 of a row, a float32 scale for each tensor.

Byte for byte what ModelOpt 0.47 packs for finite input that is not all zero; an all-zero tensor has
a defined result here (codes 0, block scales 1.0, ``weight_scale_2`` 1.0) where ModelOpt writes NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from exporter.codecs import fast
from exporter.codecs.blocks import (
    FLOATS,
    Part,
    Rows,
    Scratch,
    block_amax,
    each_part,
    given_amax,
    per_row,
    require_finite,
    require_fit,
    require_positive,
    rows_of,
    scalar_or,
    settle,
    take,
    target,
    tensor_amax,
)
from exporter.codecs.constants import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE, SCALE_FLOOR
from exporter.codecs.tables import e2m1_pairs
from verifier.errors import EncodeError

_EXPONENT = 0x7F800000
_ONE = 0x3F800000
_MAGIC = (22 << 23) + (1 << 22)
"""Makes of the bits of 2^k those of 1.5 * 2^(22 + k)."""


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Return ``weight_scale_2`` = amax / 2688 in float32; 1.0 where amax is zero, and at least the
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
        amax: the maximum to derive ``weight_scale_2`` from, shared by a fused group or a stack
            (scalar, or [...]).
        weight_scale_2: the global scale itself, float32, scalar or [...]; then ``amax`` must be
            None.
        weight_scale: the block scales themselves, float8_e4m3fn or its bytes as uint8, [..., out,
            in/16]; then ``weight_scale_2`` must be given.
        out: tensors to write into, by leaf, as they are returned.
        threads: how many work on a CPU tensor (`exporter.codecs.blocks.each_part`).

    Returns:
        ``weight`` uint8 [..., out, in/2] (even column in the low nibble), ``weight_scale``
        float8_e4m3fn [..., out, in/16], ``weight_scale_2`` float32 [...] (scalar where a scalar was
        given).

    Raises:
        EncodeError: NaN or infinity (named by index), a width that 16 does not divide, arguments
            that contradict, a given scale that is not positive and finite, a given tensor or
            ``out`` of another shape or dtype.
    """
    rows = rows_of(x, "nvfp4", NVFP4_BLOCK)
    scale_2 = _global(x, amax, weight_scale_2, weight_scale, threads)
    out = out or {}
    lead, width = x.shape[:-1], x.shape[-1]
    grid = (*lead, width // NVFP4_BLOCK)
    packed, flat_packed = target(
        out.get("weight"), "nvfp4", "weight", (*lead, width // 2), torch.uint8, x.device
    )
    scales, flat_scales = target(
        out.get("weight_scale"), "nvfp4", "weight_scale", grid, torch.float8_e4m3fn, x.device
    )
    given = (
        _given_scales(weight_scale, grid).reshape(flat_scales.shape)
        if weight_scale is not None
        else None
    )
    if "weight_scale_2" in out:
        require_fit(out["weight_scale_2"], "nvfp4", "weight_scale_2", scale_2.shape, torch.float32)
        scale_2 = out["weight_scale_2"].copy_(scale_2)

    compiled = fast.kernels(x.device)

    def work(part: Part, scratch: Scratch) -> None:
        values = scratch.floats(rows.of(part))
        wide = per_row(scale_2, part, x.shape)
        if compiled is not None:
            into, into_scales = part.of(flat_packed, 2), part.of(flat_scales, NVFP4_BLOCK)
            done, done_scales = scratch.place("packed", into), scratch.place("scales", into_scales)
            if given is not None:
                done_scales.copy_(part.of(given, NVFP4_BLOCK))
            plain, table = fast.array(values), fast.array(_tables(x.device)[1])
            worst = compiled.nvfp4_encode(
                plain,
                plain.view("int32"),
                fast.array(wide.view(-1)),
                given is not None,
                table,
                fast.array(done_scales),
                fast.array(done),
            )
            if not fast.finite(worst):
                require_finite(values.abs(), values, part, x.shape)
            settle(done, into)
            settle(done_scales, into_scales)
            return
        maxima = block_amax(values, NVFP4_BLOCK, scratch)
        require_finite(maxima, values, part, x.shape)
        stored = block_scales(maxima, wide) if given is None else part.of(given, NVFP4_BLOCK)
        part.of(flat_scales, NVFP4_BLOCK).copy_(stored)
        combined = scale_values(stored).mul_(wide)
        part.of(flat_packed, 2).copy_(pack(codes(values, combined, scratch), scratch))

    each_part(rows.shape, x.device, threads, work)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2}


def _global(
    x: torch.Tensor,
    amax: torch.Tensor | float | None,
    weight_scale_2: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    threads: int | None,
) -> torch.Tensor:
    if weight_scale_2 is not None:
        if amax is not None:
            raise EncodeError(
                "nvfp4: amax and weight_scale_2 were both given; each fixes the other"
            )
        scale_2 = scalar_or(weight_scale_2.float(), "nvfp4", "weight_scale_2", x.shape[:-2])
        require_positive(scale_2, "nvfp4", "weight_scale_2")
        return scale_2
    if weight_scale is not None:
        raise EncodeError(
            "nvfp4: weight_scale was given without the weight_scale_2 that it is relative to"
        )
    if amax is None:
        return global_scale(tensor_amax(x, "nvfp4", NVFP4_BLOCK, threads))
    return global_scale(given_amax(amax, "nvfp4", x.shape[:-2], x.device))


def _given_scales(weight_scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return given block scales as float8_e4m3fn, all of them positive numbers."""
    require_fit(weight_scale, "nvfp4", "weight_scale", shape, torch.float8_e4m3fn, torch.uint8)
    scales = weight_scale.view(torch.float8_e4m3fn)
    require_positive(scales.float(), "nvfp4", "weight_scale")
    return scales


def block_scales(maxima: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of each block from its maximum and its tensor's scale; 1.0 for a zero
    block.
    """
    wanted = maxima / (E2M1_MAX * scale_2)
    # Zero, or so far below its tensor that the quotient underflows: nothing of the block survives,
    # whatever the scale.
    zero = wanted == 0 if wanted.numel() and wanted.amin() == 0 else None
    wanted.clamp_(SCALE_FLOOR, E4M3_MAX)
    return (wanted if zero is None else wanted.masked_fill_(zero, 1.0)).to(torch.float8_e4m3fn)


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of E4M3 scales, by look-up: torch converts them one at a time on a
    CPU.
    """
    index = stored.view(torch.uint8).to(torch.int32).reshape(-1)
    return _tables(stored.device)[1].index_select(0, index).view(stored.shape)


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
    if (
        combined.numel() and combined.amin() == 0
    ):  # a given scale so small that its product is 0: 0/0 is code 0
        quotient.masked_fill_(quotient.isnan(), 0.0)
    quotient.add_(0.0).clamp_(-E2M1_MAX, E2M1_MAX)  # -0.0 + 0.0 has no sign
    sign = (
        scratch.take("sign", torch.float16, *shape).copy_(quotient).view(torch.int16)
    )  # kept by what rounds to zero
    # Adding 1.5 * 2^(22 + k), and subtracting it again, leaves a unit in the last place of 2^(k-1):
    # the E2M1 step in the value's binade, or half for what lies below 1.
    magic = torch.bitwise_and(
        quotient.view(torch.int32), _EXPONENT, out=scratch.take("magic", torch.int32, *shape)
    )
    constant = magic.clamp_(min=_ONE).add_(_MAGIC).view(torch.float32)
    rounded = quotient.add_(constant).sub_(constant)
    # Times 2^-14 the eight magnitudes are float16's subnormals and first binades, whose upper bits
    # count as E2M1 does.
    half = (
        scratch.take("half", torch.float16, *shape).copy_(rounded.mul_(2.0**-14)).view(torch.int16)
    )
    return (
        half.bitwise_right_shift_(9)
        .bitwise_and_(7)
        .bitwise_or_(sign.bitwise_right_shift_(12).bitwise_and_(8))
    )


def pack(code: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return two codes a byte, the even column in the low nibble, int32 [rows, in/2]; the low byte
    counts.

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
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_part`).

    Raises:
        EncodeError: a part is missing, parts do not fit one another, ``out`` does not fit.
    """
    packed = take(parts, "nvfp4", ("weight",), torch.uint8)
    scale = take(parts, "nvfp4", ("weight_scale",), torch.uint8, torch.float8_e4m3fn).view(
        torch.uint8
    )
    scale_2 = scalar_or(
        take(parts, "nvfp4", ("weight_scale_2",), *FLOATS),
        "nvfp4",
        "weight_scale_2",
        packed.shape[:-2],
    )
    shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))
    if scale.shape != (*shape[:-1], shape[-1] // NVFP4_BLOCK) or shape[-1] % NVFP4_BLOCK:
        raise EncodeError(
            f"nvfp4: weight_scale {list(scale.shape)} does not fit a weight of {list(shape)}"
        )
    result, flat = target(out, "nvfp4", "out", shape, dtype, packed.device)
    flat_packed, flat_scale = Rows(packed), Rows(scale)
    pairs, table = _tables(packed.device)
    compiled = fast.kernels(packed.device)

    def work(part: Part, scratch: Scratch) -> None:
        into = part.of(flat)
        values = scratch.place("values", into, torch.float32)
        wide, stored, size = (
            per_row(scale_2, part, shape),
            flat_scale.of(part.scaled(NVFP4_BLOCK)),
            values.shape,
        )
        if compiled is not None:
            bytes_ = flat_packed.of(part.scaled(2)).contiguous()
            arrays = [
                fast.array(t) for t in (bytes_, stored.contiguous(), wide.view(-1), table, values)
            ]
            compiled.nvfp4_decode(*arrays)
        else:
            index = scratch.take("index", torch.int32, size[0], size[1] // 2).copy_(
                flat_packed.of(part.scaled(2))
            )
            found = scratch.take("found", torch.int32, index.numel())
            torch.index_select(pairs, 0, index.view(-1), out=found)
            combined = scale_values(stored).mul_(wide)
            values.copy_(found.view(torch.float16).view(size))
            values.view(*combined.shape, NVFP4_BLOCK).mul_(combined.unsqueeze(-1))
        settle(values, into)

    each_part((flat.shape[0], flat.shape[1]), packed.device, threads, work)
    return result
