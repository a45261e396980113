# SPDX-License-Identifier: Apache-2.0
"""Encode and decode weights, by the format names of `verifier.schemes`. Pure functions on torch tensors, any device."""

from __future__ import annotations

import torch

from exporter.codecs import fp8, mxfp8, nvfp4
from exporter.codecs.blocks import tensor_amax
from exporter.codecs.constants import MX_BLOCK, NVFP4_BLOCK
from verifier.errors import EncodeError
from verifier.schemes import FORMATS

Parts = dict[str, torch.Tensor]


def encode(
    x: torch.Tensor,
    fmt: str,
    *,
    amax: torch.Tensor | float | None = None,
    weight_scale_2: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out: Parts | None = None,
) -> Parts:
    """Encode weights [..., out, in] and return the tensors by their leaf on disk.

    Args:
        x: float32, bfloat16 or float16, any stride, any device.
        fmt: a name of `verifier.schemes.FORMATS`.
        amax, weight_scale_2, weight_scale: each fixes what would be computed; one that the format has no use for, or
            that contradicts another, is refused.
        out: tensors to write into, by leaf (``nvfp4``, ``w4a16_nvfp4``, ``mxfp8``).

    Raises:
        EncodeError: NaN or infinity in ``x`` (named by index), a width the block does not divide, a refused argument.
    """
    _known(fmt)
    if fmt in ("nvfp4", "w4a16_nvfp4"):
        return nvfp4.encode(x, amax=amax, weight_scale_2=weight_scale_2, weight_scale=weight_scale, out=out)
    if weight_scale_2 is not None:
        raise EncodeError(f"{fmt} has no weight_scale_2")
    if fmt == "mxfp8":
        if amax is not None:
            raise EncodeError("mxfp8 has no tensor scale: amax is of no use to it")
        return mxfp8.encode(x, weight_scale=weight_scale, out=out)
    if out is not None:
        raise EncodeError(f"{fmt}: out= is not supported")
    if amax is not None and weight_scale is not None:
        raise EncodeError(f"{fmt}: amax and weight_scale were both given; each fixes the other")
    return fp8.encode(x, fmt, amax=amax, weight_scale=weight_scale)


def decode(parts: Parts, fmt: str, *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the values of one weight or stack, [..., out, in], computed in float32 and cast to ``dtype``.

    Raises:
        EncodeError: an unknown format, parts that do not fit one another.
    """
    _known(fmt)
    if fmt in ("nvfp4", "w4a16_nvfp4"):
        return nvfp4.decode(parts, dtype=dtype, out=out)
    if fmt == "mxfp8":
        return mxfp8.decode(parts, dtype=dtype, out=out)
    return fp8.decode(parts, fmt, dtype=dtype, out=out)


def amax(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """Return max |x| of each matrix of [..., out, in], float32 [...]; what a fused group shares."""
    _known(fmt)
    return tensor_amax(x, fmt, {"nvfp4": NVFP4_BLOCK, "w4a16_nvfp4": NVFP4_BLOCK, "mxfp8": MX_BLOCK}.get(fmt, 1))


def _known(fmt: str) -> None:
    if fmt not in FORMATS:
        raise EncodeError(f"no format {fmt!r}; one of {', '.join(sorted(FORMATS))}")


__all__ = ["amax", "decode", "encode"]
