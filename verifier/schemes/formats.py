# SPDX-License-Identifier: Apache-2.0
"""What each quantization format puts on disk: siblings, dtypes, shapes, block.

Sources: NVIDIA ModelOpt 0.47 (unified HF export) for the NVFP4, MXFP8 and FP8 layouts; OCP
Microscaling Formats v1.0 section 5.3 for MXFP8 and MXFP4; DeepSeek-V3's config for 128x128 block
FP8. Here ``out`` and ``in`` are the logical dimensions of the linear layer, in elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


def _scalar(_out: int, _in: int) -> tuple[Shape, ...]:
    return ((), (1,))


def _per_row(out: int, _in: int) -> tuple[Shape, ...]:
    return ((out,), (out, 1))


def _tiles(out: int, in_: int) -> tuple[Shape, ...]:
    rows, cols = -(-out // 128), -(-in_ // 128)
    return ((rows, cols), (rows, 1, cols, 1))


def _blocks(size: int) -> Callable[[int, int], tuple[Shape, ...]]:
    return lambda out, in_: ((out, -(-in_ // size)),)


@dataclass(frozen=True, slots=True)
class Sibling:
    """One scale tensor beside a weight: its names on disk, dtypes and the shapes it may have."""

    leaves: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    required: bool = True

    @property
    def scalar(self) -> bool:
        """Whether the format gives it one value for the whole tensor."""
        return self.shapes is _scalar


@dataclass(frozen=True, slots=True)
class Format:
    """A quantization format; ``block`` is (rows, columns) that share a scale, None for a whole row
    or tensor.
    """

    name: str
    algo: str
    weight_dtype: str
    block: tuple[int, int] | None
    siblings: tuple[Sibling, ...]

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte (``weight`` is U8 of half the width)."""
        return self.weight_dtype == "U8"

    @property
    def group_size(self) -> int | None:
        """The block width along the input dimension, in elements."""
        return self.block[1] if self.block else None

    @property
    def rowwise(self) -> bool:
        """Whether a block is a run of columns in one row."""
        return self.block is not None and self.block[0] == 1

    def sibling(self, leaf: str) -> Sibling | None:
        """Return the sibling that ``leaf`` names."""
        return next((s for s in self.siblings if leaf in s.leaves), None)


_NVFP4_SCALES = (
    Sibling(("weight_scale",), ("F8_E4M3",), _blocks(16)),
    Sibling(("weight_scale_2",), ("F32",), _scalar),
)
_INPUT = Sibling(("input_scale",), ("F32",), _scalar)
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("nvfp4", "NVFP4", "U8", (1, 16), (*_NVFP4_SCALES, _INPUT)),
        Format("w4a16_nvfp4", "W4A16_NVFP4", "U8", (1, 16), _NVFP4_SCALES),
        Format(
            "mxfp8",
            "MXFP8",
            "F8_E4M3",
            (1, 32),
            (Sibling(("weight_scale", "weight_scale_inv"), ("U8", "F8_E8M0"), _blocks(32)),),
        ),
        Format(
            "fp8",
            "FP8",
            "F8_E4M3",
            None,
            (
                Sibling(("weight_scale", "weight_scale_inv"), ("F32",), _scalar),
                Sibling(("input_scale",), ("F32",), _scalar, required=False),
            ),
        ),
        Format(
            "fp8_per_channel",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "F8_E4M3",
            None,
            (Sibling(("weight_scale",), ("F32",), _per_row),),
        ),
        Format(
            "fp8_block",
            "FP8_PB_WO",
            "F8_E4M3",
            (128, 128),
            (Sibling(("weight_scale_inv", "weight_scale"), ("F32",), _tiles),),
        ),
        # compressed-tensors 0.20: the global scales are divisors, 2688 / amax.
        Format(
            "nvfp4_ct",
            "NVFP4_PACK_QUANTIZED",
            "U8",
            (1, 16),
            (
                Sibling(("weight_scale",), ("F8_E4M3",), _blocks(16)),
                Sibling(("weight_global_scale",), ("F32",), _scalar),
                Sibling(("input_global_scale",), ("F32",), _scalar, required=False),
            ),
        ),
        # gpt-oss spells weight and scale `<parameter>_blocks` [out, in/32, 16] and
        # `<parameter>_scales`.
        Format(
            "mxfp4",
            "MXFP4",
            "U8",
            (1, 32),
            (Sibling(("weight_scale", "scales"), ("U8", "F8_E8M0"), _blocks(32)),),
        ),
    )
}


def same_layout(a: Format, b: Format) -> bool:
    """Whether two formats store weights alike (NVFP4 with and without an input scale)."""
    return a is b or {a.name, b.name} == {"nvfp4", "w4a16_nvfp4"}


def runtime_layout(shape: Shape, rows: int, columns: int) -> str:
    """Return how a block scale's shape differs from [rows, columns] as kernels want it, or ''.

    Kernels read scales in tiles of 128 rows by 4 columns, so both are padded up (``padded``); in
    memory a tile is 32 x 16 values (``swizzled``), and the tiles are often flattened. Source:
    cuBLAS 12.9, "1D block scaling factors layout".
    """
    tall, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    if shape == (rows, columns):
        return ""
    if shape in ((tall, wide), (tall, columns), (rows, wide)):
        return "padded"
    tiled = len(shape) != 2 or shape == (tall // 4, wide * 4)
    return "swizzled" if shape and tiled and math.prod(shape) == tall * wide > 0 else ""


FORMAT_OF_ALGO: dict[str, str] = {
    **{f.algo: f.name for f in FORMATS.values()},
    "FP8_BLOCK_SCALES": "fp8_block",
    "NVFP4_AWQ": "nvfp4",
    "NVFP4_SVD": "nvfp4",
}
"""quant_algo as ModelOpt spells it to the name of its format; other algorithms are known by name
only."""
KNOWN_ALGOS = frozenset(FORMAT_OF_ALGO) | {
    "MIXED_PRECISION",
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "MXFP4",
    "INT8_SQ",
    "INT4_AWQ",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "W8A16",
    "W8A8_SQ_PER_CHANNEL",
}
