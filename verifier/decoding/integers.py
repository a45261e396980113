# SPDX-License-Identifier: Apache-2.0
"""Decoders of integers: ``(q - zero point) * scale``, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.decoding.bits import unpacked
from verifier.decoding.parts import (
    Array,
    Parts,
    as_bytes,
    as_floats,
    as_words,
    fitted,
    part,
    scale_part,
    weight_part,
)
from verifier.decoding.tables import Float32
from verifier.errors import ContentError
from verifier.schemes import Format

Integers = npt.NDArray[np.int16]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight whose code is in each nibble of a word, low nibble first."""


def int8(parts: Parts, fmt: Format) -> Float32:
    """Return I8 values under scales of the matrix, the row, or blocks of a row."""
    weight = weight_part(parts, fmt)
    q = weight.view(np.int8).astype(np.float32)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        q = q - _over(np.asarray(zero).astype(np.float32), q.shape, fmt)
    return q * _over(as_floats(scale_part(parts, fmt)), q.shape, fmt)


def _over(scale: Float32, shape: tuple[int, ...], fmt: Format) -> Float32:
    """Return a scale of the matrix, of rows or of blocks such that it broadcasts over ``shape``."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.size == np.prod(shape[:-1]):
        return fitted(scale, shape[:-1], fmt)[..., None]
    return _repeated(scale, shape, fmt)


def _repeated(scale: Float32, shape: tuple[int, ...], fmt: Format) -> Float32:
    """Return a scale of each block of a row, once for each of its columns."""
    groups = scale.shape[-1] if scale.ndim == len(shape) else 0
    if not groups or scale.shape[:-1] != shape[:-1] or shape[-1] % groups:
        raise ContentError(
            f"{fmt.name}: a scale of {list(scale.shape)} does not fit a weight of {list(shape)}"
        )
    return np.repeat(scale, shape[-1] // groups, axis=-1)


def int_packed(parts: Parts, fmt: Format) -> Float32:
    """Return compressed-tensors' packed integers: codes are q + 2^(bits-1)."""
    words = as_words(weight_part(parts, fmt), fmt)
    scale = as_floats(scale_part(parts, fmt))
    bits, in_ = fmt.bits, _width(parts, words, fmt)
    half = np.float32(1 << (bits - 1))
    q = unpacked(words.view(np.uint8), bits, in_).astype(np.float32) - half
    if "weight_zero_point" in parts:
        packed = as_words(np.asarray(parts["weight_zero_point"]), fmt)
        down = np.ascontiguousarray(packed.T)
        zero = unpacked(down.view(np.uint8), bits, q.shape[0]).T.astype(np.float32) - half
        q = q - _columns(zero, parts.get("weight_g_idx"), q.shape, fmt)
    return q * _columns(scale, parts.get("weight_g_idx"), q.shape, fmt)


def _width(parts: Parts, words: Array, fmt: Format) -> int:
    """Return the logical width: as stored in ``weight_shape``, else all that the words hold."""
    held = int(words.shape[-1]) * 32 // fmt.bits
    shape = parts.get("weight_shape")
    if shape is None:
        return held
    stated = [int(n) for n in np.asarray(shape).reshape(-1)]
    if len(stated) != 2 or stated[0] != words.shape[0] or not held - 32 < stated[1] <= held:
        raise ContentError(
            f"{fmt.name}: weight_shape {stated} does not fit words of {list(words.shape)}"
        )
    return stated[1]


def _columns(scale: Float32, index: Any, shape: tuple[int, ...], fmt: Format) -> Float32:
    """Return a scale once for each column, by the group of each input where it is stored."""
    if index is not None and scale.ndim == 2 and scale.shape[1] > 1:
        groups = _checked(np.asarray(index), shape[-1], scale.shape[1], fmt)
        if scale.shape[0] == shape[0]:
            return scale[:, groups]
    return _repeated(scale, shape, fmt)


def _checked(index: Array, width: int, groups: int, fmt: Format) -> Array:
    if index.shape != (width,) or index.dtype.kind not in "iu":
        raise ContentError(f"{fmt.name}: a group index of {list(index.shape)}; [{width}] belongs")
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise ContentError(f"{fmt.name}: a group index beyond the {groups} groups")
    return index


def gptq(parts: Parts, fmt: Format) -> Float32:
    """Return GPTQ's integers; the first version of the format stores a zero point less one."""
    words = as_words(weight_part(parts, fmt), fmt)
    down = np.ascontiguousarray(words.T)
    q = unpacked(down.view(np.uint8), fmt.bits, words.shape[0] * 32 // fmt.bits)
    zeros = as_words(part(parts, "qzeros", fmt=fmt), fmt)
    zero = unpacked(zeros.view(np.uint8), fmt.bits, words.shape[1]).astype(np.float32)
    if fmt.name == "gptq":
        zero += 1
    return _by_inputs(q.astype(np.float32), zero, parts, fmt)


def awq(parts: Parts, fmt: Format) -> Float32:
    """Return AWQ's integers, eight of four bits in a word in an order of its own."""
    if fmt.bits != 4:
        raise ContentError(f"{fmt.name}: {fmt.bits} bits; the order of four-bit codes is known")
    q = _nibbles(as_words(weight_part(parts, fmt), fmt), AWQ_ORDER)
    zero = _nibbles(as_words(part(parts, "qzeros", fmt=fmt), fmt), AWQ_ORDER)
    return _by_inputs(q.T.astype(np.float32), zero.astype(np.float32), parts, fmt)


def quark_int4(parts: Parts, fmt: Format) -> Float32:
    """Return Quark's integers: two's complement, or unsigned with zero points."""
    order = tuple(range(8)) if fmt.name.endswith("_order") else AWQ_ORDER
    q = _nibbles(as_words(weight_part(parts, fmt), fmt), order)
    if fmt.name.startswith("int4"):
        return _by_inputs(_signed(q).T, None, parts, fmt)
    zeros = as_words(part(parts, "weight_zero_point", fmt=fmt), fmt)
    zero = _nibbles(zeros, order).astype(np.float32)
    return _by_inputs(q.T.astype(np.float32), zero, parts, fmt)


def _nibbles(words: Array, order: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the codes of each row of words, column by column."""
    flat = unpacked(words.view(np.uint8), 4, words.shape[-1] * 8)
    eights = flat.reshape(*words.shape, 8)
    ordered = np.empty_like(eights)
    ordered[..., list(order)] = eights
    return ordered.reshape(flat.shape)


def _signed(codes: npt.NDArray[np.uint8]) -> Float32:
    """Return nibbles as two's complement."""
    return (codes ^ np.uint8(8)).astype(np.float32) - np.float32(8)


def _by_inputs(q: Float32, zero: Float32 | None, parts: Parts, fmt: Format) -> Float32:
    """Return values [out, in] under scales and zero points [groups, out]."""
    scale = as_floats(scale_part(parts, fmt))
    out, in_ = q.shape
    groups = scale.shape[0] if scale.ndim == 2 else 0
    if not groups or scale.shape[1] != out or in_ % groups:
        raise ContentError(
            f"{fmt.name}: scales {list(scale.shape)} do not fit a weight of {[out, in_]}"
        )
    if zero is not None and zero.shape != scale.shape:
        raise ContentError(
            f"{fmt.name}: zero points for {list(zero.shape)}, scales for {list(scale.shape)}"
        )
    index = parts.get("g_idx")
    of_input = np.arange(in_) // (in_ // groups)
    if index is not None:
        of_input = _checked(np.asarray(index), in_, groups, fmt)
    shifted = q if zero is None else q - zero.T[:, of_input]
    values: Float32 = shifted * scale.T[:, of_input]
    return values


def int4_awq(parts: Parts, fmt: Format) -> Float32:
    """Return ModelOpt's INT4: rows 2k and 2k+1 in the low and the high nibble of a byte.

    W4A8_AWQ's ``weight_scale_2`` is that of the FP8 product, not of the values.
    """
    packed = as_bytes(weight_part(parts, fmt))
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-2)
    shape = (*packed.shape[:-2], packed.shape[-2] * 2, packed.shape[-1])
    q = _signed(pairs).reshape(shape)
    return q * _repeated(as_floats(scale_part(parts, fmt)), shape, fmt)


def mlx_affine(parts: Parts, fmt: Format) -> Float32:
    """Return MLX's integers: q * scale + bias."""
    words = as_words(weight_part(parts, fmt), fmt)
    in_ = words.shape[-1] * 32 // fmt.bits
    q = unpacked(words.view(np.uint8), fmt.bits, in_).astype(np.float32)
    scale = _repeated(as_floats(scale_part(parts, fmt)), q.shape, fmt)
    bias = _repeated(as_floats(part(parts, "biases", fmt=fmt)), q.shape, fmt)
    values: Float32 = q * scale + bias
    return values
