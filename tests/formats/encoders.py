# SPDX-License-Identifier: Apache-2.0
"""One small encoder per format: from the weight of a linear layer to its tensors by leaf.

Layouts are those of each format's own writer (docs/formats.md); rounding is to the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.formats.files import Array, Tensors
from tests.formats.models import activation_amax, generator, input_scales
from tests.formats.numbers import (
    amax,
    bf16,
    blocks,
    e2m1,
    e4m3,
    e8m0,
    e8m0_bytes,
    exp2,
    f32,
    integers,
    minifloat,
    nibbles,
    pack,
    pack_awq,
    pack_rows,
    power_of_two,
    spread,
    tiles,
)

INT_GROUP = 128
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of bitsandbytes' NF4 codes."""


@dataclass(frozen=True)
class Linear:
    """A linear layer to encode: its BF16 weight as float32, and the weights of all layers that
    engines join to one with it, its own among them.
    """

    name: str
    weight: Array
    joined: tuple[Array, ...]

    @property
    def joined_amax(self) -> float:
        """The largest absolute weight of all joined layers."""
        return max(float(np.abs(w).max()) for w in self.joined)

    def changed(self, change: Callable[[Array], Array]) -> Linear:
        """Return the layer with its weight and all joined ones changed alike."""
        return Linear(self.name, change(self.weight), tuple(change(w) for w in self.joined))

    @property
    def inputs(self) -> float:
        """The largest input."""
        return activation_amax(self.name)


Encoder = Callable[[Linear], Tensors]


# --- Floats of four bits


def _nvfp4(linear: Linear, top: float) -> tuple[Array, Array, Array]:
    """Return packed codes, block scales and the tensor's scale, of which ``top`` is the divisor."""
    tensor_scale = np.float32(linear.joined_amax) / np.float32(top)
    parts = blocks(linear.weight, 16)
    scale = e4m3(np.maximum(amax(parts, -1) / (6 * tensor_scale), 2.0**-9))
    codes = e2m1(parts / (scale.astype(np.float32) * tensor_scale))
    return nibbles(codes.reshape(linear.weight.shape)), scale[..., 0], f32(tensor_scale)


def nvfp4(linear: Linear) -> Tensors:
    """NVFP4 of ModelOpt, with activations in four bits."""
    return w4a16_nvfp4(linear) | {"input_scale": f32(linear.inputs / 2688)}


def w4a16_nvfp4(linear: Linear) -> Tensors:
    """NVFP4 of ModelOpt, weights alone."""
    packed, scale, tensor_scale = _nvfp4(linear, 2688)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": tensor_scale}


def smoothed(encode: Encoder) -> Encoder:
    """Return an encoder of the weight divided by a ``pre_quant_scale`` per input channel."""

    def encoder(linear: Linear) -> Tensors:
        scale = input_scales(linear.name, linear.weight.shape[1])
        wide = scale.astype(np.float32)
        return encode(linear.changed(lambda w: w / wide)) | {"pre_quant_scale": scale}

    return encoder


def nvfp4_svd(linear: Linear) -> Tensors:
    """NVFP4 of ModelOpt of what a low-rank part and a smoothing leave over."""
    smooth = input_scales(linear.name, linear.weight.shape[1]).astype(np.float32)
    low, high = _low_rank(linear.weight / smooth)

    def rest(weight: Array) -> Array:
        left, right = _low_rank(weight / smooth)
        found: Array = weight - (left.astype(np.float32) @ right.astype(np.float32)) * smooth
        return found

    parts = smoothed(nvfp4)(linear.changed(rest))
    return parts | {"svdquant_lora_a": high, "svdquant_lora_b": low}


def _low_rank(weight: Array, rank: int = 8) -> tuple[Array, Array]:
    """Return BF16 factors [out, rank] and [rank, in] of the part of a weight that is largest."""
    left, size, right = np.linalg.svd(weight, full_matrices=False)
    return bf16(left[:, :rank] * size[:rank]), bf16(right[:rank])


def w4a8_nvfp4_fp8(linear: Linear) -> Tensors:
    """NVFP4 weights for activations in FP8: block scales times 6 stay within E4M3."""
    packed, scale, tensor_scale = _nvfp4(linear, 448)
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": tensor_scale,
        "input_scale": f32(linear.inputs / 448),
    }


def ct_nvfp4(linear: Linear) -> Tensors:
    """NVFP4 of compressed-tensors: its tensor scales are divisors."""
    return ct_nvfp4a16(linear) | {"input_global_scale": f32([2688 / linear.inputs])}


def ct_nvfp4a16(linear: Linear) -> Tensors:
    """NVFP4 of compressed-tensors, weights alone."""
    packed, scale, tensor_scale = _nvfp4(linear, 2688)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": f32([1 / tensor_scale]),
    }


def quark_nvfp4(linear: Linear) -> Tensors:
    """NVFP4 of Quark: the input's tensor scale has a name of its own."""
    return w4a16_nvfp4(linear) | {"input_scale_2": f32(linear.inputs / 2688)}


def _mxfp4(weight: Array) -> tuple[Array, Array]:
    """Return four-bit codes and the exponents of the blocks."""
    parts = blocks(weight, 32)
    exponent = power_of_two(amax(parts, -1), 6)
    return e2m1(parts / exp2(exponent)).reshape(weight.shape), exponent[..., 0]


def mxfp4(leaf: str) -> Encoder:
    """Return an encoder of MXFP4 whose weight has this leaf."""

    def encoder(linear: Linear) -> Tensors:
        codes, exponent = _mxfp4(linear.weight)
        return {leaf: nibbles(codes), "weight_scale": e8m0_bytes(exponent)}

    return encoder


def w4a8_mxfp4_fp8(linear: Linear) -> Tensors:
    """MXFP4 weights of ModelOpt for activations in FP8."""
    return mxfp4("weight")(linear) | {"input_scale": f32(linear.inputs / 448)}


def deepseek_mxfp4(linear: Linear) -> Tensors:
    """Experts of DeepSeek-V4: MXFP4 in signed bytes, scales as E8M0."""
    codes, exponent = _mxfp4(linear.weight)
    return {"weight": nibbles(codes).view(np.int8), "scale": e8m0(exponent)}


def gpt_oss(weight: Array) -> Tensors:
    """Stacked experts of gpt-oss, [experts, out, in]."""
    codes, exponent = _mxfp4(weight.reshape(-1, weight.shape[-1]))
    count, out, width = weight.shape
    return {
        "blocks": nibbles(codes).reshape(count, out, width // 32, 16),
        "scales": e8m0_bytes(exponent).reshape(count, out, width // 32),
    }


# --- Floats of six and eight bits


def mxfp6(leaf: str, kind: type, top: float) -> Encoder:
    """Return an encoder of MXFP6: four codes in three bytes, low bits first."""

    def encoder(linear: Linear) -> Tensors:
        parts = blocks(linear.weight, 32)
        exponent = power_of_two(amax(parts, -1), top)
        codes = minifloat(parts / exp2(exponent), kind, top).reshape(linear.weight.shape)
        return {leaf: pack(codes, 6, np.uint8), "weight_scale": e8m0_bytes(exponent[..., 0])}

    return encoder


E2M3 = (ml_dtypes.float6_e2m3fn, 7.5)
E3M2 = (ml_dtypes.float6_e3m2fn, 28.0)


def mxfp8(linear: Linear, leaf: str = "weight_scale") -> Tensors:
    """MXFP8."""
    parts = blocks(linear.weight, 32)
    exponent = power_of_two(amax(parts, -1), 448)
    codes = e4m3(parts / exp2(exponent)).reshape(linear.weight.shape)
    return {"weight": codes, leaf: e8m0_bytes(exponent[..., 0])}


def _fp8(weight: Array, scale: Array | float) -> Array:
    return e4m3(weight / scale)


def fp8_tensor(*, kind: np.dtype[np.generic], shape: tuple[int, ...], static: bool) -> Encoder:
    """Return an encoder of FP8 with one scale, of a dtype and of shape [] or [1]."""

    def encoder(linear: Linear) -> Tensors:
        scale = np.full(shape, linear.joined_amax / 448, np.float32).astype(kind)
        parts = {"weight": _fp8(linear.weight, float(scale.astype(np.float32).max()))}
        parts["weight_scale"] = scale
        if static:
            parts["input_scale"] = np.full(shape, linear.inputs / 448, np.float32).astype(kind)
        return parts

    return encoder


def fp8_channel(*, kind: np.dtype[np.generic], column: bool) -> Encoder:
    """Return an encoder of FP8 with a scale per row, [out, 1] or [out]."""

    def encoder(linear: Linear) -> Tensors:
        scale = (amax(linear.weight, -1) / 448).astype(kind)
        codes = _fp8(linear.weight, scale.astype(np.float32))
        return {"weight": codes, "weight_scale": scale if column else scale[:, 0]}

    return encoder


def fp8_block(leaf: str, *, kind: np.dtype[np.generic], size: int = 128) -> Encoder:
    """Return an encoder of FP8 with a scale per square tile."""

    def encoder(linear: Linear) -> Tensors:
        scale = (tiles(linear.weight, size) / 448).astype(kind)
        wide = spread(scale.astype(np.float32), size, linear.weight.shape)
        return {"weight": _fp8(linear.weight, wide), leaf: scale}

    return encoder


def fp8_block_powers(leaf: str, *, byte: bool, size: int = 128) -> Encoder:
    """Return an encoder of FP8 whose scales per tile are powers of two, as E8M0 or as float32."""

    def encoder(linear: Linear) -> Tensors:
        exponent = power_of_two(tiles(linear.weight, size), 448)
        wide = spread(exp2(exponent), size, linear.weight.shape)
        scale = e8m0(exponent) if byte else exp2(exponent)
        return {"weight": _fp8(linear.weight, wide), leaf: scale}

    return encoder


def modelopt_fp8_block(linear: Linear) -> Tensors:
    """FP8 blocks of ModelOpt: the scales are [rows, 1, columns, 1]."""
    parts = fp8_block("weight_scale", kind=np.dtype(np.float32))(linear)
    return parts | {"weight_scale": parts["weight_scale"][:, None, :, None]}


# --- Integers


def _symmetric(
    weight: Array, group: int, bits: int, kind: np.dtype[np.generic]
) -> tuple[Array, Array]:
    """Return signed codes [out, in] and scales [out, groups]."""
    top = 2 ** (bits - 1)
    parts = blocks(weight, group)
    scale = (amax(parts, -1) / (top - 0.5)).astype(kind)
    codes = integers(parts / scale.astype(np.float32), -top, top - 1)
    return codes.reshape(weight.shape), scale[..., 0]


def _asymmetric(
    weight: Array, group: int, bits: int, kind: np.dtype[np.generic]
) -> tuple[Array, Array, Array]:
    """Return unsigned codes [out, in], scales and zero points [out, groups]."""
    top = 2**bits - 1
    parts = blocks(weight, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = ((high - low) / top).astype(kind)
    wide = scale.astype(np.float32)
    zero = integers(-low / wide, 0, top)
    codes = integers(parts / wide[..., None] + zero[..., None], 0, top)
    return codes.reshape(weight.shape), scale, zero


BFLOAT = np.dtype(ml_dtypes.bfloat16)
HALF = np.dtype(np.float16)


def ct_int(
    *, bits: int, group: int | None = INT_GROUP, symmetric: bool = True, ordered: bool = False
) -> Encoder:
    """Return an encoder of pack-quantized integers of compressed-tensors.

    ``group`` is None for one scale per row; ``ordered`` writes ``weight_g_idx``.
    """

    def encoder(linear: Linear) -> Tensors:
        out, width = linear.weight.shape
        size = group or width
        order = generator(linear.name).permutation(width) if ordered else np.arange(width)
        weight = linear.weight[:, order]
        half = 2 ** (bits - 1)
        zeros: Tensors = {}
        if symmetric:
            codes, scale = _symmetric(weight, size, bits, BFLOAT)
            stored = codes + half
        else:
            stored, scale, zero = _asymmetric(weight, size, bits, BFLOAT)
            zeros = {"weight_zero_point": pack_rows(zero, bits, np.int32)}
        back = np.argsort(order)
        parts = {
            "weight_packed": pack(stored[:, back], bits, np.int32),
            "weight_scale": scale,
            "weight_shape": np.array([out, width], np.int64),
            **zeros,
        }
        if ordered:
            parts["weight_g_idx"] = (back // size).astype(np.int32)
        return parts

    return encoder


def ct_int8(linear: Linear) -> Tensors:
    """int-quantized of compressed-tensors: eight bits, a scale per row."""
    codes, scale = _symmetric(linear.weight, linear.weight.shape[1], 8, BFLOAT)
    return {"weight": codes.astype(np.int8), "weight_scale": scale}


def gptq(
    *,
    bits: int = 4,
    symmetric: bool = True,
    offset: int = 1,
    g_idx: bool = True,
    ordered: bool = False,
) -> Encoder:
    """Return an encoder of GPTQ; the stored zero point is the zero point less ``offset``."""

    def encoder(linear: Linear) -> Tensors:
        width = linear.weight.shape[1]
        order = generator(linear.name).permutation(width) if ordered else np.arange(width)
        weight = linear.weight[:, order]
        if symmetric:
            codes, scale = _symmetric(weight, INT_GROUP, bits, HALF)
            half = 2 ** (bits - 1)
            codes, zero = codes + half, np.full(scale.shape, half)
        else:
            codes, scale, zero = _asymmetric(weight, INT_GROUP, bits, HALF)
            zero = np.maximum(zero, offset)
        back = np.argsort(order)
        parts = {
            "qweight": pack_rows(codes[:, back].T, bits, np.int32),
            "qzeros": pack((zero - offset).T, bits, np.int32),
            "scales": np.ascontiguousarray(scale.T),
        }
        if g_idx:
            parts["g_idx"] = (back // INT_GROUP).astype(np.int32)
        return parts

    return encoder


def awq(linear: Linear) -> Tensors:
    """AWQ, version gemm."""
    codes, scale, zero = _asymmetric(linear.weight, INT_GROUP, 4, HALF)
    return {
        "qweight": pack_awq(codes.T),
        "qzeros": pack_awq(zero.T),
        "scales": np.ascontiguousarray(scale.T),
    }


def quark_int4(linear: Linear) -> Tensors:
    """INT4 of Quark with pack_method reorder: two's complement nibbles in AWQ's order."""
    codes, scale = _symmetric(linear.weight, INT_GROUP, 4, BFLOAT)
    return {
        "weight": pack_awq(codes.T & 15),
        "weight_scale": np.ascontiguousarray(scale.T),
        "weight_zero_point": pack_awq(np.zeros(scale.T.shape, np.int64)),
    }


def _modelopt_int4(linear: Linear) -> Tensors:
    codes, scale = _symmetric(linear.weight, INT_GROUP, 4, np.dtype(np.float32))
    nibble = (codes & 15).astype(np.uint8)
    return {"weight": nibble[0::2] | (nibble[1::2] << 4), "weight_scale": bf16(scale)}


def modelopt_int4_awq(linear: Linear) -> Tensors:
    """W4A16_AWQ of ModelOpt: two rows share a byte."""
    return smoothed(_modelopt_int4)(linear)


def modelopt_w4a8_awq(linear: Linear) -> Tensors:
    """W4A8_AWQ of ModelOpt."""
    return modelopt_int4_awq(linear) | {
        "weight_scale_2": f32(linear.joined_amax / 448),
        "input_scale": f32(linear.inputs / 448),
    }


def modelopt_w8a16(linear: Linear) -> Tensors:
    """W8A16 of ModelOpt: eight bits, a scale per row."""
    codes, scale = _symmetric(linear.weight, linear.weight.shape[1], 8, np.dtype(np.float32))
    return {"weight": codes.astype(np.int8), "weight_scale": scale[:, 0]}


def modelopt_int8_sq(linear: Linear) -> Tensors:
    """W8A8_SQ_PER_CHANNEL of ModelOpt."""
    return smoothed(modelopt_w8a16)(linear) | {"input_scale": f32(linear.inputs / 127)}


def w4afp8(linear: Linear) -> Tensors:
    """Experts of SGLang's w4afp8: two codes in a signed byte."""
    codes, scale = _symmetric(linear.weight, INT_GROUP, 4, BFLOAT)
    return {
        "weight": nibbles(codes & 15).view(np.int8),
        "weight_scale_inv": scale,
        "input_scale": f32([linear.inputs / 448]),
    }


# --- Other tools


def _codebook(linear: Linear, book: Array, size: int) -> tuple[Array, Array]:
    """Return the codes nearest to a weight's blocks over their largest values, and these."""
    flat = linear.weight.reshape(-1, size)
    top = amax(flat, -1)
    codes = np.abs((flat / top)[..., None] - book).argmin(axis=-1)
    return codes.reshape(-1), top[:, 0]


def bnb_nf4(linear: Linear) -> Tensors:
    """NF4 of bitsandbytes: one column of bytes, high nibble first."""
    codes, top = _codebook(linear, np.array(NF4, np.float32), 64)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(linear.weight.shape),
    }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        "weight": ((codes[0::2] << 4) | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": top,
        "weight.quant_map": np.array(NF4, np.float32),
        "weight.quant_state.bitsandbytes__nf4": text,
    }


def bnb_int8(linear: Linear) -> Tensors:
    """LLM.int8 of bitsandbytes."""
    top = amax(linear.weight, -1)
    return {
        "weight": integers(linear.weight / top * 127, -127, 127).astype(np.int8),
        "SCB": f32(top[:, 0]),
        "weight_format": np.array(0, np.uint8),
    }


def torchao_fp8(linear: Linear) -> Tensors:
    """Float8Tensor of torchao with a scale per row."""
    scale = amax(linear.weight, -1) / 448
    return {"_weight_qdata": _fp8(linear.weight, scale), "_weight_scale": f32(scale)}


def torchao_int4(linear: Linear) -> Tensors:
    """Int4Tensor of torchao."""
    codes, scale = _symmetric(linear.weight, INT_GROUP, 4, BFLOAT)
    return {
        "_weight_qdata": nibbles(codes & 15),
        "_weight_scale": np.ascontiguousarray(scale.T),
        "_weight_zero_point": np.zeros(scale.T.shape, BFLOAT),
    }


def mlx_affine(linear: Linear) -> Tensors:
    """Affine integers of MLX, group 64."""
    parts = blocks(linear.weight, 64)
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    scale, bias = bf16((high - low) / 15), bf16(low)
    codes = integers((parts - bias.astype(np.float32)) / scale.astype(np.float32), 0, 15)
    return {
        "weight": pack(codes.reshape(linear.weight.shape), 4, np.uint32),
        "scales": scale[..., 0],
        "biases": bias[..., 0],
    }


def mlx_mxfp4(linear: Linear) -> Tensors:
    """MXFP4 of MLX."""
    codes, exponent = _mxfp4(linear.weight)
    return {"weight": pack(codes, 4, np.uint32), "scales": e8m0_bytes(exponent)}


def mlx_nvfp4(linear: Linear) -> Tensors:
    """NVFP4 of MLX: no scale of the tensor."""
    parts = blocks(linear.weight, 16)
    scale = e4m3(np.maximum(amax(parts, -1) / 6, 2.0**-9))
    codes = e2m1(parts / scale.astype(np.float32)).reshape(linear.weight.shape)
    return {"weight": pack(codes, 4, np.uint32), "scales": scale[..., 0].view(np.uint8)}
