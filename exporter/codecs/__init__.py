# SPDX-License-Identifier: Apache-2.0
"""Encode and decode weights in the formats of `verifier.schemes`: pure functions on torch tensors,
any device.
"""

from __future__ import annotations

import torch

from exporter.codecs import foreign, fp8, mxfp8, nvfp4
from exporter.codecs.blocks import take, tensor_amax
from exporter.codecs.constants import MX_BLOCK, NVFP4_BLOCK
from exporter.codecs.fast import backend, use
from verifier.errors import EncodeError

Parts = dict[str, torch.Tensor]
"""The tensors of one weight or stack, by their leaf on disk: ``weight``, ``weight_scale``, …"""
BLOCKS = {
    "nvfp4": NVFP4_BLOCK,
    "w4a16_nvfp4": NVFP4_BLOCK,
    "mxfp8": MX_BLOCK,
    "fp8": 1,
    "fp8_per_channel": 1,
    "fp8_block": 1,
}
"""The formats that are encoded, with the number that must divide the input dimension."""
READ_ONLY = {"nvfp4_ct": foreign.nvfp4_ct, "mxfp4": foreign.mxfp4}
"""The formats that are only decoded."""


def encode(
    x: torch.Tensor,
    fmt: str,
    *,
    amax: torch.Tensor | float | None = None,
    weight_scale_2: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out: Parts | None = None,
    threads: int | None = None,
) -> Parts:
    """Encode weights [..., out, in] and return the tensors by their leaf on disk.

    Args:
        x: float32, bfloat16 or float16, any stride, any device.
        fmt: a name of `BLOCKS`.
        amax: the maximum to derive scales from; refused if the format has no tensor scale.
        weight_scale_2: the global scale to use (NVFP4).
        weight_scale: the block, row or tensor scale to use; NVFP4 needs ``weight_scale_2`` with it.
        out: tensors to write into, by leaf (``nvfp4``, ``w4a16_nvfp4``, ``mxfp8``), with the shapes
            and dtypes of the result.
        threads: how many work on one CPU tensor, each with one intra-op thread; None takes
            `torch.get_num_threads`. The bytes do not depend on it.

    Raises:
        EncodeError: NaN or infinity in ``x`` (named by index), a width that the block size does not
            divide, a refused argument, an argument that does not fit ``x``, scales that are not
            positive and finite.
    """
    _require_format(fmt)
    if fmt in ("nvfp4", "w4a16_nvfp4"):
        return nvfp4.encode(
            x,
            amax=amax,
            weight_scale_2=weight_scale_2,
            weight_scale=weight_scale,
            out=out,
            threads=threads,
        )
    if weight_scale_2 is not None:
        raise EncodeError(f"{fmt} has no weight_scale_2")
    if fmt == "mxfp8":
        if amax is not None:
            raise EncodeError("mxfp8 has no tensor scale; do not pass amax")
        return mxfp8.encode(x, weight_scale=weight_scale, out=out, threads=threads)
    if out is not None:
        raise EncodeError(f"{fmt}: out= is not supported")
    if amax is not None and weight_scale is not None:
        raise EncodeError(f"{fmt}: pass amax or weight_scale, not both")
    return fp8.encode(x, fmt, amax=amax, weight_scale=weight_scale, threads=threads)


def decode(
    parts: Parts,
    fmt: str,
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Return the values of one weight or stack, [..., out, in], computed in float32 and cast to
    ``dtype``.

    Args:
        parts: the tensors by their leaf, as `encode` returns them; one-byte formats may be uint8.
        fmt: a name of `BLOCKS` or `READ_ONLY`.
        dtype: of the result.
        out: where to write it, instead of allocating: of the result's shape and dtype.
        threads: as for `encode`.

    Raises:
        EncodeError: an unknown format, a missing part, parts or an ``out`` that do not fit.
    """
    if fmt in READ_ONLY:
        return READ_ONLY[fmt](parts, dtype=dtype, out=out, threads=threads)
    _require_format(fmt)
    if (weight := take(parts, fmt, ("weight",))).ndim < 2:
        raise EncodeError(f"{fmt}: weight has shape {list(weight.shape)}; expected [..., out, in]")
    if fmt in ("nvfp4", "w4a16_nvfp4"):
        return nvfp4.decode(parts, dtype=dtype, out=out, threads=threads)
    if fmt == "mxfp8":
        return mxfp8.decode(parts, dtype=dtype, out=out, threads=threads)
    return fp8.decode(parts, fmt, dtype=dtype, out=out, threads=threads)


def amax(x: torch.Tensor, fmt: str, *, threads: int | None = None) -> torch.Tensor:
    """Return max |x| of each matrix of [..., out, in], float32 [...]; a fused group shares one.

    Raises:
        EncodeError: an unknown format, NaN or infinity in ``x``, a width that the block size does
            not divide.
    """
    _require_format(fmt)
    return tensor_amax(x, fmt, BLOCKS[fmt], threads)


def _require_format(fmt: str) -> None:
    if fmt not in BLOCKS:
        raise EncodeError(f"unknown format {fmt}; use one of {', '.join(sorted(BLOCKS))}")


__all__ = ["amax", "backend", "decode", "encode", "use"]
