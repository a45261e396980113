# SPDX-License-Identifier: Apache-2.0
"""Formats that are read and never written: MXFP4 (OCP Microscaling v1.0) and the NVFP4 of
compressed-tensors.
"""

from __future__ import annotations

import torch

from exporter.codecs.blocks import (
    FLOATS,
    Chunk,
    Rows,
    Scratch,
    each_chunk,
    output,
    require_fit,
    scalar_or,
    take,
)
from exporter.codecs.constants import MX_BLOCK, NVFP4_BLOCK
from exporter.codecs.tables import e2m1_pairs, e8m0_powers
from verifier.errors import EncodeError


def mxfp4(
    parts: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return E2M1 codes times 2^(scale - 127) in float32, cast to ``dtype``; [..., out, in].

    Args:
        parts: ``weight`` or ``weight_packed`` uint8 [..., out, in/2] with ``weight_scale`` [...,
            out, in/32] (uint8 or float8_e8m0fnu), or gpt-oss's ``blocks`` uint8 [..., out, in/32,
            16] with ``scales``; the even column is in the low nibble.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_chunk`).

    Raises:
        EncodeError: a missing part, parts or an ``out`` that do not fit.
    """
    code, scale = mxfp4_codes(parts)
    shape = (*code.shape[:-1], code.shape[-1] * 2)
    result, flat = output(out, "mxfp4", "out", shape, dtype, code.device)
    _write(flat, code, e8m0_powers().to(code.device)[scale.to(torch.int64)], MX_BLOCK, threads)
    return result


def mxfp4_codes(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, uint8 [..., out, in/2], and the scale bytes, uint8 [..., out, in/32], of an
    MXFP4 weight.

    Raises:
        EncodeError: a missing part, or parts that do not fit each other.
    """
    leaves = ("scales", "weight_scale")
    scale = take(parts, "mxfp4", leaves, torch.uint8, torch.float8_e8m0fnu).view(torch.uint8)
    code = take(parts, "mxfp4", ("blocks", "weight", "weight_packed"), torch.uint8)
    if "blocks" in parts:
        require_fit(code, "mxfp4", "blocks", (*scale.shape, MX_BLOCK // 2))
        code = code.reshape(*scale.shape[:-1], scale.shape[-1] * (MX_BLOCK // 2))
    if (
        code.ndim < 2
        or code.shape[:-1] != scale.shape[:-1]
        or code.shape[-1] * 2 != scale.shape[-1] * MX_BLOCK
    ):
        raise EncodeError(f"mxfp4: scales {list(scale.shape)} do not fit codes {list(code.shape)}")
    return code, scale


def nvfp4_ct(
    parts: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return ``(weight_scale / weight_global_scale) * code`` in float32, cast to ``dtype``; [...,
    out, in].

    Args:
        parts: as compressed-tensors 0.20 writes ``nvfp4-pack-quantized``: ``weight_packed`` uint8
            [..., out, in/2], ``weight_scale`` float8_e4m3fn [..., out, in/16],
            ``weight_global_scale`` float32 [1] (a divisor).
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: how many work on CPU tensors (`exporter.codecs.blocks.each_chunk`).

    Raises:
        EncodeError: a missing part, parts or an ``out`` that do not fit.
    """
    code = take(parts, "nvfp4_ct", ("weight_packed", "weight"), torch.uint8)
    scale = take(parts, "nvfp4_ct", ("weight_scale",), torch.uint8, torch.float8_e4m3fn)
    divisor = take(parts, "nvfp4_ct", ("weight_global_scale",), *FLOATS).float()
    divisor = scalar_or(divisor, "nvfp4_ct", "weight_global_scale", code.shape[:-2])
    if code.ndim < 2:
        raise EncodeError(
            f"nvfp4_ct: weight_packed has shape {list(code.shape)}; expected [..., out, in/2]"
        )
    shape = (*code.shape[:-1], code.shape[-1] * 2)
    require_fit(scale, "nvfp4_ct", "weight_scale", (*code.shape[:-1], shape[-1] // NVFP4_BLOCK))
    result, flat = output(out, "nvfp4_ct", "out", shape, dtype, code.device)
    values = scale.view(torch.float8_e4m3fn).float()
    values = values / (divisor[..., None, None] if divisor.ndim else divisor)
    _write(flat, code, values, NVFP4_BLOCK, threads)
    return result


def _write(
    flat: torch.Tensor, code: torch.Tensor, scale: torch.Tensor, block: int, threads: int | None
) -> None:
    """Write codes times the scale of their block into rows, by chunks."""
    pairs = e2m1_pairs().to(code.device)
    codes, scales = Rows(code), Rows(scale)

    def work(chunk: Chunk, _: Scratch) -> None:
        stored, factor = codes.read(chunk.scaled(2)), scales.read(chunk.scaled(block))
        values = pairs.index_select(0, stored.to(torch.int32).reshape(-1))
        values = values.view(*factor.shape, block) * factor.unsqueeze(-1)
        chunk.slice(flat).copy_(values.flatten(1))

    each_chunk((flat.shape[0], flat.shape[1]), code.device, threads, work)
