# SPDX-License-Identifier: Apache-2.0
"""Defects of values, which only the bytes show: QC501 to QC605."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.selftest.corruptor import (
    DOWNS,
    GPTQ,
    KINDS,
    MIXED,
    MXFP8,
    NVFP4,
    UPS,
    Corruptor,
    Kind,
    block_scale,
    edit,
    embedding,
    expert_of,
    ids,
    norm,
    plain_linear,
    quantized,
    scale_leaf,
    sibling_of,
    target,
)
from verifier.selftest.edit import Folder, Place

ROW, BLOCK = 5, 2
Whole = npt.NDArray[Any]
_EITHER = ("base|merged_from",)


def _f32(value: float) -> bytes:
    return struct.pack("<f", value)


def _scale_byte(value: int) -> Callable[[Folder], Place]:
    """Return a change of one byte of a block scale."""

    def apply(folder: Folder) -> Place:
        name = block_scale(folder, target(folder))
        width = folder.tensors()[name].shape[1]
        return folder.overwrite(name, ROW * width + BLOCK, bytes([value]))

    return apply


def _scalar(leaf: str, value: float) -> Callable[[Folder], Place]:
    """Return a change of one projection's F32 scalar."""

    def apply(folder: Folder) -> Place:
        return folder.overwrite(f"{target(folder, DOWNS)}.{leaf}", 0, _f32(value))

    return apply


def zero_scale_of_zero_block(folder: Folder) -> Place:
    """Zero the codes of a block and its scale: nothing more is lost."""
    module = target(folder)
    name = block_scale(folder, module)
    place = ROW * folder.tensors()[name].shape[1] + BLOCK
    # Sixteen codes in eight bytes; 0x8 is the code of a negative zero.
    folder.overwrite(f"{module}.weight", place * 8, bytes([0x00, 0x80, 0x08, 0x88, 0, 0, 0, 0]))
    return folder.overwrite(name, place, b"\0")


def zero_expert(folder: Folder) -> Place:
    """Write what ModelOpt 0.47 makes of an all-zero expert: NaN block scales under a zero global
    scale.
    """
    module = target(folder, DOWNS)
    name = block_scale(folder, module)
    folder.overwrite(f"{module}.weight_scale_2", 0, _f32(0.0))
    return folder.overwrite(name, 0, b"\x7f" * folder.tensors()[name].nbytes)


def underflown_scales(folder: Folder) -> Place:
    """Zero the block scales of one row and keep the codes: a clamp is missing."""
    module = target(folder, DOWNS)
    name = block_scale(folder, module)
    scales = folder.array(name).view(np.uint8)
    scales[1, :] = 0
    folder.overwrite(name, 0, scales.tobytes())
    return folder.place(name, scales.shape[1])


def scale_2_zero(folder: Folder) -> Place:
    """Zero the global scale of one projection: the whole tensor reads as zero."""
    return folder.overwrite(f"{target(folder, DOWNS)}.weight_scale_2", 0, _f32(0.0))


def scale_2_of_up_doubled(folder: Folder) -> Place:
    """Calibrate up on its own maximum: another global scale, and block scales to match."""
    up = sibling_of(target(folder), UPS)
    name = f"{up}.weight_scale_2"
    place = folder.overwrite(name, 0, _f32(float(folder.array(name)) * 2))
    scales = folder.array(f"{up}.weight_scale").astype(np.float32) / 2
    folder.store(f"{up}.weight_scale", scales.astype(ml_dtypes.float8_e4m3fn))
    return place


def scale_2_of_up_one_bit(folder: Folder) -> Place:
    """Make the pair's global scales differ in the last bit."""
    name = f"{sibling_of(target(folder), UPS)}.weight_scale_2"
    bits = int(folder.array(name).view(np.uint32)) ^ 1
    return folder.overwrite(name, 0, bits.to_bytes(4, "little"))


def scale_2_of_up_tenfold(folder: Folder) -> Place:
    """Make the pair's global scales differ tenfold, as in one public checkpoint."""
    name = f"{sibling_of(target(folder), UPS)}.weight_scale_2"
    return folder.overwrite(name, 0, _f32(float(folder.array(name)) * 10))


def _whole(leaf: str, change: Callable[[Whole], Whole]) -> Callable[[Folder], Place]:
    """Return a change of one GPTQ tensor of whole numbers."""

    def apply(folder: Folder) -> Place:
        name = next(n for n in folder.tensors() if n.endswith(f"down_proj.{leaf}"))
        folder.store(name, np.ascontiguousarray(change(folder.array(name).copy())))
        return Place(name)

    return apply


def _zeros_of_version_2(words: Whole) -> Whole:
    return np.full_like(words.view(np.uint32), 0x88888888).view(np.int32)


def _one_zero_point(words: Whole) -> Whole:
    words.reshape(-1).view(np.uint32)[3] ^= np.uint32(0x0F)
    return words


def _group_beyond(index: Whole) -> Whole:
    index[5] = len(index)
    return index


def _group_too_large(index: Whole) -> Whole:
    index[-1] = 0
    return index


def _norm_value(value: float) -> Callable[[Folder], Place]:
    """Return a change of one value of a norm."""

    def apply(folder: Folder) -> Place:
        name = norm(folder)
        return folder.overwrite(name, 3, np.asarray(value, folder.array(name).dtype).tobytes())

    return apply


def _swap(folder: Folder, one: str, other: str) -> Place:
    for leaf in folder.modules()[one]:
        mine, theirs = folder.array(f"{one}.{leaf}"), folder.array(f"{other}.{leaf}")
        folder.store(f"{one}.{leaf}", theirs)
        folder.store(f"{other}.{leaf}", mine)
    return folder.place(f"{min(one, other, key=list(folder.modules()).index)}.weight")


def gate_and_up_swapped(folder: Folder) -> Place:
    """Take one expert's gate and up from the wrong halves of the fused tensor."""
    gate = target(folder)
    return _swap(folder, gate, sibling_of(gate, UPS))


def experts_swapped(folder: Folder) -> Place:
    """Let two experts' down projections change places in un-stacking."""
    down = target(folder, DOWNS)
    container, number, leaf = expert_of(down)
    return _swap(folder, down, f"{container}.{number ^ 1}.{leaf}")


def nibbles_swapped(folder: Folder) -> Place:
    """Pack the even column into the high nibble."""
    name = f"{target(folder)}.weight"
    codes = folder.array(name)
    return folder.store(name, (codes << 4) | (codes >> 4))


def rows_rolled(folder: Folder) -> Place:
    """Roll the codes by one output row, and not the scales."""
    name = f"{target(folder)}.weight"
    return folder.store(name, np.roll(folder.array(name), 1, axis=0))


def coarse_nvfp4(folder: Folder) -> Place:
    """Clear the lowest bit of each code: a coarser grid than the format's."""
    name = f"{target(folder)}.weight"
    return folder.store(name, folder.array(name) & np.uint8(0xEE))


def coarse_mxfp8(folder: Folder) -> Place:
    """Clear the two lowest bits of each code: one bit of mantissa is left."""
    name = f"{target(folder)}.weight"
    codes = folder.array(name).view(np.uint8) & np.uint8(0xFC)
    return folder.store(name, codes.view(ml_dtypes.float8_e4m3fn))


def scale_doubled(folder: Folder) -> Place:
    """Double the block scales of a whole tensor."""
    module = target(folder)
    leaf = scale_leaf(folder.modules()[module])
    scales = folder.array(f"{module}.{leaf}")
    if scales.dtype == np.uint8:
        folder.store(f"{module}.{leaf}", scales + np.uint8(1))
    else:
        wide = np.minimum(scales.astype(np.float32) * 2, np.float32(448))
        folder.store(f"{module}.{leaf}", wide.astype(ml_dtypes.float8_e4m3fn))
    return folder.place(f"{module}.weight")


def nan_code(folder: Folder) -> Place:
    """Write one NaN code (0x7F) into an F8_E4M3 weight."""
    name = f"{target(folder)}.weight"
    width = folder.tensors()[name].shape[1]
    folder.overwrite(name, ROW * width + BLOCK, b"\x7f")
    return folder.place(name)


def scales_cast_to_zero(folder: Folder) -> Place:
    """Write 0, which is 2^-127, for every E8M0 scale of a tensor: float values were cast to
    bytes.
    """
    module = target(folder)
    name = block_scale(folder, module)
    folder.overwrite(name, 0, bytes(folder.tensors()[name].nbytes))
    return Place(name, folder.tensors()[name].file)


def _recast(folder: Folder, name: str, dtype: type[np.generic]) -> Place:
    return folder.store(name, folder.array(name).astype(dtype))


def router_recast(folder: Folder) -> Place:
    """Save the float32 router as BF16."""
    return _recast(folder, f"{plain_linear(folder)}.weight", ml_dtypes.bfloat16)


def norm_widened(folder: Folder) -> Place:
    """Save a norm as float32."""
    return _recast(folder, norm(folder), np.float32)


def head_as_f16(folder: Folder) -> Place:
    """Save the embedding as float16."""
    return _recast(folder, embedding(folder), np.float16)


def _flip(folder: Folder, name: str, element: int, byte: int, bits: int) -> Place:
    tensor = folder.tensors()[name]
    raw = bytearray(folder.read(name)[element * tensor.itemsize : (element + 1) * tensor.itemsize])
    raw[byte] ^= bits
    folder.overwrite(name, element, bytes(raw))
    return folder.place(name, element, byte)


def one_bit(folder: Folder) -> Place:
    """Flip one bit of the embedding."""
    name = embedding(folder)
    return _flip(folder, name, 3 * folder.tensors()[name].shape[1] + 17, 0, 1)


def cast_there_and_back(folder: Folder) -> Place:
    """Cast the router to a narrower dtype and back."""
    name = f"{plain_linear(folder)}.weight"
    values = folder.array(name)
    folder.store(name, values.astype(ml_dtypes.float8_e4m3fn).astype(values.dtype))
    return folder.place(name)


def _kept(folder: Folder) -> str:
    return next(m for m in quantized(folder) if m.endswith(".q_proj"))


def kept_code(folder: Folder) -> Place:
    """Flip one bit in a code of a tensor that a mixed export keeps."""
    name = f"{_kept(folder)}.weight"
    return _flip(folder, name, folder.tensors()[name].shape[1] + 9, 0, 1)


def kept_scale(folder: Folder) -> Place:
    """Flip one bit in a block scale of a tensor that a mixed export keeps."""
    name = block_scale(folder, _kept(folder))
    return _flip(folder, name, folder.tensors()[name].shape[1] + 1, 0, 1)


_EXPERTS = frozenset({"experts"})
_BASE = ("base",)


def _values(
    rule: str,
    name: str,
    change: Callable[[Folder], Place],
    also: str = "",
    formats: frozenset[Kind] = NVFP4,
    traits: frozenset[str] = frozenset(),
) -> Corruptor:
    return Corruptor(
        rule, name, edit(change), "payload", formats=formats, traits=traits, also=ids(also)
    )


VALUES: tuple[Corruptor, ...] = (
    _values("QC501", "zero-block-scale", _scale_byte(0x00)),
    _values("QC501", "negative-zero-block-scale", _scale_byte(0x80)),
    _values("QC501", "underflown-block-scales", underflown_scales),
    _values("QC501", "zero-weight-scale-2", scale_2_zero, "515"),
    Corruptor(
        "QC501",
        "zero-scale-of-a-zero-block",
        edit(zero_scale_of_zero_block),
        "payload",
        formats=NVFP4,
        severity="warning",
    ),
    _values("QC502", "nan-block-scale", _scale_byte(0x7F)),
    _values("QC502", "negative-nan-block-scale", _scale_byte(0xFF)),
    _values("QC502", "negative-block-scale", _scale_byte(0xB8)),
    _values("QC502", "nan-e8m0-scale", _scale_byte(0xFF), formats=MXFP8),
    _values("QC502", "zero-expert", zero_expert, "501"),
    _values("QC502", "nan-weight-scale-2", _scalar("weight_scale_2", float("nan"))),
    _values("QC502", "infinite-weight-scale-2", _scalar("weight_scale_2", float("inf"))),
    _values("QC502", "negative-weight-scale-2", _scalar("weight_scale_2", -1.0), "515"),
    _values("QC503", "zero-input-scale", _scalar("input_scale", 0.0)),
    _values("QC503", "nan-input-scale", _scalar("input_scale", float("nan"))),
    _values("QC503", "infinite-input-scale", _scalar("input_scale", float("inf"))),
    _values("QC503", "denormal-input-scale", _scalar("input_scale", 1e-39)),
    _values("QC503", "negative-input-scale", _scalar("input_scale", -1.0)),
    Corruptor(
        "QC503",
        "input-scale-far-from-siblings",
        edit(_scalar("input_scale", 1e9)),
        "payload",
        formats=NVFP4,
        traits=_EXPERTS,
        severity="warning",
    ),
    _values("QC504", "up-on-its-own-maximum", scale_2_of_up_doubled, traits=_EXPERTS),
    _values("QC504", "last-bit", scale_2_of_up_one_bit, traits=_EXPERTS),
    _values("QC504", "tenfold", scale_2_of_up_tenfold, "515", traits=_EXPERTS),
    _values("QC508", "nan-in-a-norm", _norm_value(float("nan")), "605", formats=KINDS),
    _values("QC508", "infinity-in-a-norm", _norm_value(float("-inf")), "605", formats=KINDS),
    Corruptor("QC511", "gate-and-up-swapped", edit(gate_and_up_swapped), "payload", _BASE),
    Corruptor("QC515", "experts-swapped", edit(experts_swapped), "payload", _BASE, traits=_EXPERTS),
    Corruptor("QC510", "nibbles-swapped", edit(nibbles_swapped), "payload", _BASE, NVFP4),
    Corruptor("QC515", "rows-rolled", edit(rows_rolled), "payload", _BASE),
    Corruptor("QC515", "scales-doubled", edit(scale_doubled), "payload", _BASE),
    Corruptor("QC515", "nan-code", edit(nan_code), "payload", _BASE, MXFP8),
    _values("QC512", "scales-cast-to-bytes", scales_cast_to_zero, formats=MXFP8),
    Corruptor(
        "QC515",
        "coarse-codes",
        edit(coarse_nvfp4),
        "payload",
        _BASE,
        NVFP4,
        severity="warning",
        instead=ids("517"),
    ),
    Corruptor(
        "QC515",
        "coarse-codes-mxfp8",
        edit(coarse_mxfp8),
        "payload",
        _BASE,
        MXFP8,
        severity="warning",
        instead=ids("517"),
    ),
    *(
        Corruptor(
            "QC518",
            name,
            edit(_whole(leaf, change)),
            "payload",
            formats=GPTQ,
            also=ids("515 517"),
        )
        for name, leaf, change in (
            ("zeros-of-version-2", "qzeros", _zeros_of_version_2),
            ("one-zero-point", "qzeros", _one_zero_point),
            ("group-beyond-the-last", "g_idx", _group_beyond),
            ("group-of-one-too-many", "g_idx", _group_too_large),
        )
    ),
    Corruptor(
        "QC516", "router-recast", edit(router_recast), "header", _EITHER, traits=frozenset({"f32"})
    ),
    Corruptor("QC516", "norm-widened", edit(norm_widened), "header", _EITHER),
    Corruptor("QC516", "embedding-as-f16", edit(head_as_f16), "header", _EITHER),
    Corruptor("QC605", "one-bit-of-the-embedding", edit(one_bit), "payload", _EITHER),
    Corruptor("QC605", "router-cast-there-and-back", edit(cast_there_and_back), "payload", _EITHER),
    Corruptor(
        "QC605", "one-code-of-a-kept-tensor", edit(kept_code), "payload", ("merged_from",), MIXED
    ),
    Corruptor(
        "QC605",
        "one-scale-of-a-kept-tensor",
        edit(kept_scale),
        "payload",
        ("merged_from",),
        MIXED,
        also=ids("517"),
    ),
)
