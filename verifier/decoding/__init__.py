# SPDX-License-Identifier: Apache-2.0
"""Quantized values and scales on disk to float32, in numpy.

Formats: E2M1, E4M3 and E8M0 as in OCP Microscaling Formats v1.0 section 5.3; NVFP4's two-level
scale as ModelOpt and vLLM read it, ``(weight_scale * weight_scale_2) * code`` in float32; the rest
as `verifier.schemes.FORMATS` says. Nothing here is shared with the exporter's codecs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from verifier.decoding import floats, integers
from verifier.decoding.parts import Array, Parts, as_floats
from verifier.decoding.tables import (
    E2M1_MAX,
    E4M3_MAX,
    Float32,
    e2m1_table,
    e2m3_table,
    e3m2_table,
    e4m3_table,
    e8m0_table,
    nibble_pairs,
)
from verifier.errors import ContentError
from verifier.schemes import FORMATS, Format

Decoder = Callable[[Parts, Format], Float32]
DECODERS: dict[str, Decoder] = {
    "nvfp4": floats.nvfp4,
    "w4a16_nvfp4": floats.nvfp4,
    "nvfp4_awq": floats.nvfp4,
    "nvfp4_svd": floats.nvfp4,
    "nvfp4_quark": floats.nvfp4,
    "nvfp4_ct": floats.nvfp4,
    "w4a8_nvfp4_fp8": floats.nvfp4,
    "w4a8_mxfp4_fp8": floats.mxfp4,
    "mxfp4": floats.mxfp4,
    "mxfp6_e2m3": floats.mxfp6,
    "mxfp6_e3m2": floats.mxfp6,
    "mxfp8": floats.mxfp8,
    "fp8": floats.fp8,
    "fp8_per_channel": floats.fp8_per_channel,
    "fp8_block": floats.fp8_block,
    "mxfp8_block": floats.fp8_block,
    "mlx_mxfp4": floats.mlx,
    "mlx_nvfp4": floats.mlx,
    "mlx_mxfp8": floats.mlx,
    "int8": integers.int8,
    "int_packed": integers.int_packed,
    "int4_awq": integers.int4_awq,
    "w4a8_awq": integers.int4_awq,
    "gptq": integers.gptq,
    "gptq_v2": integers.gptq,
    "awq": integers.awq,
    "int4_quark": integers.quark_int4,
    "int4_quark_order": integers.quark_int4,
    "uint4_quark": integers.quark_int4,
    "uint4_quark_order": integers.quark_int4,
    "mlx_affine": integers.mlx_affine,
}
"""By the name of the format; what has none is recognised and not decoded."""


def decode(parts: Parts, fmt: str | Format) -> Float32:
    """Return the values of one quantized weight, float32, shape [..., out, in].

    They are those that a layer multiplies its inputs with: a ``pre_quant_scale`` of the inputs and
    a low-rank correction (``svdquant_lora_a``, ``svdquant_lora_b``) are part of them.

    Args:
        parts: the tensors by their leaf on disk (``weight``, ``weight_scale`` or
            ``weight_scale_inv``, ``weight_scale_2`` …), each in its on-disk dtype or, if it holds
            one-byte or float32 values, as raw uint8 bytes of the same shape.
        fmt: a format, or a name of `verifier.schemes.FORMATS` for one with its usual parameters;
            ``mxfp4`` also as gpt-oss ships it, ``blocks`` [..., in/32, 16] and ``scales``
            [..., in/32].

    Raises:
        ContentError: an unknown format, a missing part, a shape that does not fit.
    """
    known = FORMATS.get(fmt) if isinstance(fmt, str) else fmt
    if known is None:
        raise ContentError(f"no format {fmt!r}; one of {', '.join(sorted(FORMATS))}")
    decoder = DECODERS.get(known.name)
    if decoder is None:
        raise ContentError(f"{known.name}: its values are not decoded")
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        values = decoder(parts, known)
        if "svdquant_lora_a" in parts and "svdquant_lora_b" in parts:
            values = values + _product(parts["svdquant_lora_b"], parts["svdquant_lora_a"], values)
        if "pre_quant_scale" in parts:
            values = values * _of_inputs(parts["pre_quant_scale"], values)
    return values


def _product(b: Array, a: Array, values: Float32) -> Float32:
    left, right = as_floats(np.asarray(b)), as_floats(np.asarray(a))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ContentError(f"a correction of {list(left.shape)} by {list(right.shape)}")
    product: Float32 = left @ right
    if product.shape != values.shape:
        raise ContentError(f"a correction of {list(product.shape)} for {list(values.shape)}")
    return product


def _of_inputs(scale: Array, values: Float32) -> Float32:
    factors = as_floats(np.asarray(scale))
    if factors.shape[-1:] != values.shape[-1:] or factors.size != values.shape[-1]:
        raise ContentError(
            f"a pre_quant_scale of {list(factors.shape)} for {values.shape[-1]} inputs"
        )
    return factors.reshape(values.shape[-1])


def widen(array: Array) -> Float32:
    """Return an unquantized tensor as float32 (BF16 and F16 widen exactly)."""
    return array.astype(np.float32)


__all__ = [
    "DECODERS",
    "E2M1_MAX",
    "E4M3_MAX",
    "Float32",
    "decode",
    "e2m1_table",
    "e2m3_table",
    "e3m2_table",
    "e4m3_table",
    "e8m0_table",
    "nibble_pairs",
    "widen",
]
