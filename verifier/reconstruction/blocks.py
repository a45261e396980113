# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a decoded weight are not the base's, and why.

All functions take a `WeightPair` and weights of the same shape, float32 [out, in]: ``nearest`` is
the base under the stored scales, ``by_max`` the base under ``max`` calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.decoding import Float32
from verifier.reconstruction import yardstick
from verifier.reconstruction.distance import DEFAULT_BLOCK, beyond, block_norms2
from verifier.schemes import Format

COARSE = 0.05
"""Where more than this share of the blocks is somewhat off, the weight is coarse throughout."""
MOVED = 0.1
"""Where more than this share of the other blocks has values that are clearly not the nearest, the
method moves weights on purpose."""
ONE_SIDED_SHARE, ONE_SIDE = 0.01, 0.95
"""Where more than this share of the values is not the nearest, and this share of those lies on one
side, the values belong to different scales."""
FACTOR = 0.12
"""A block whose values are off by a common factor beyond this has the scale of different values."""
NVFP4_RANGE = 2688.0
"""A tensor's maximum is this many times its global scale."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class WeightPair:
    """A quantized weight: as stored (tensors by leaf), decoded, and the base's values."""

    format: Format
    parts: Mapping[str, npt.NDArray[Any]]
    decoded: Float32
    base: Float32

    @property
    def width(self) -> int:
        """Values per block, at most `DEFAULT_BLOCK`."""
        return min(self.format.group_size or DEFAULT_BLOCK, DEFAULT_BLOCK)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many blocks are affected, and row and block of the first."""

    count: int = 0
    first: tuple[int, int] | None = None


def foreign_blocks(pair: WeightPair, nearest: Float32) -> Blocks:
    """Return the blocks that are not the base's although their scales could hold it.

    Such a block has an error of more than 1.5 times what its scale allows. A method that
    compensates errors (GPTQ) chooses values other than the nearest all over the tensor; then no
    block counts. Nor does one where many blocks are somewhat off and none is entirely different:
    such a weight is coarse, and is compared as a whole.
    """
    far, near, size = (
        block_norms2(x, pair.width)
        for x in (pair.decoded - pair.base, nearest - pair.base, pair.base)
    )
    foreign = beyond(far, near, size)
    count = int(foreign.sum())
    different = foreign & (far > 0.25 * np.maximum(size, 0.25 * float(size.mean())))
    coarse = count > COARSE * foreign.size and not different.any()
    if not count or count > foreign.size / 2 or coarse:
        return Blocks()
    moved = block_norms2(_not_nearest(pair, nearest).astype(np.float32), pair.width)[~foreign]
    return Blocks() if moved.size == 0 or (moved > 0).mean() > MOVED else _marked(foreign)


def rescaled_blocks(pair: WeightPair, by_max: Float32, nearest: Float32) -> Blocks:
    """Return the blocks that one factor corrects: their values belong to a different scale.

    A block whose values all are the nearest under its stored scale belongs to that scale, however
    coarse the scale is: scales of 16x16 blocks, powers of two and clipped scales are chosen so.

    Error compensation (GPTQ) and clipping move the values of a block in different directions, which
    no factor corrects. A block at the format's smallest scale may be anything, and one that equals
    ``max`` calibration under the stored tensor scale, which a fused group or a stack shares, is
    right.
    """
    sizes = (
        block_norms2(x, pair.width)
        for x in (pair.decoded, pair.decoded - pair.base, by_max - pair.base, pair.base)
    )
    corrected = _corrected_by_factor(*sizes, least=FACTOR)
    exempt = _exempt(pair)
    if exempt is not None and exempt.shape == corrected.shape:
        corrected &= ~exempt
    corrected &= block_norms2(pair.decoded - nearest, pair.width) > 0
    return _marked(corrected)


def rescaled_groups(pair: WeightPair, by_max: Float32) -> Blocks:
    """Return the scales of rows, of tiles or of the tensor that one factor corrects; the first as
    row and block of `DEFAULT_BLOCK` values.

    So many values share such a scale that chance never makes one factor explain their errors:
    however small the factor is, it counts where it removes three quarters of the squared error.
    """
    height, width = pair.base.shape
    per_row = pair.format.name == "fp8_per_channel"
    rows, columns = pair.format.block or ((1, width) if per_row else (height, width))
    down = np.arange(0, height, rows)
    across = np.arange(0, -(-width // DEFAULT_BLOCK), -(-columns // DEFAULT_BLOCK))

    def shared(values: Float32) -> Float32:
        blocks = block_norms2(values, DEFAULT_BLOCK).astype(np.float64)
        by_row = np.add.reduceat(blocks, down, axis=0)
        return np.asarray(np.add.reduceat(by_row, across, axis=1), np.float32)

    decoded, base = pair.decoded, pair.base
    sizes = (shared(x) for x in (decoded, decoded - base, by_max - base, base))
    groups = _marked(_corrected_by_factor(*sizes, least=0))
    if groups.first is None:
        return groups
    row, column = groups.first
    return Blocks(groups.count, (int(down[row]), int(across[column])))


def is_off_by_a_factor(pair: WeightPair, nearest: Float32) -> bool:
    """Whether the values were chosen under scales that are all a little larger, or all a little
    smaller, than those stored.

    Then a value that is not the nearest is always on the same side. Under scales 65/64 times too
    large, 2% of NVFP4's values are not the nearest and all of them lie above; GPTQ, AutoRound,
    stochastic rounding and quantization-aware training have half of them on each side.
    """
    above = np.abs(pair.decoded) > np.abs(nearest)
    below = np.abs(pair.decoded) < np.abs(nearest)
    floor = _at_floor(pair)
    if floor is not None and floor.shape[1] * pair.width == above.shape[1]:
        free = ~np.repeat(floor, pair.width, axis=1)  # a format has no scale below its smallest
        above, below = above & free, below & free
    up, down = int(above.sum()), int(below.sum())
    wrong = up + down
    return wrong >= ONE_SIDED_SHARE * pair.base.size and max(up, down) >= ONE_SIDE * wrong


def is_moved(pair: WeightPair, nearest: Float32) -> bool:
    """Whether values other than the nearest are all over the tensor, as often above as below.

    That is what error compensation does (simulated for NVFP4 and MXFP8: in 0.36 to 1.0 of the
    blocks, 0.40 to 0.57 above); truncation and coarse grids err in one direction.
    """
    moved = _not_nearest(pair, nearest)
    width = pair.format.group_size or DEFAULT_BLOCK
    blocks = float((block_norms2(moved.astype(np.float32), width) > 0).mean())
    nonzero = moved & (nearest != 0)
    if blocks < 0.3 or not nonzero.any():
        return False
    above = float((np.abs(pair.decoded[nonzero]) > np.abs(nearest[nonzero])).mean())
    return 0.3 <= above <= 0.7


def relative_error(values: Float32, base: Float32) -> float:
    """Return ||values - base|| / ||base||, infinity where it is not defined."""
    with np.errstate(over="ignore", invalid="ignore"):
        size, error = norm(base), norm(values - base)
    return error / size if size > 0 and np.isfinite(error) else float("inf")


def norm(values: Float32) -> float:
    """Return the Euclidean norm, summed in float64."""
    # Not a dot product: that would start BLAS threads next to the others.
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def _not_nearest(pair: WeightPair, nearest: Float32) -> Mask:
    """Return where a value is clearly not the nearest: 2^-6 is four times what dividing in BF16 can
    do.
    """
    excess = np.abs(pair.decoded - pair.base) - np.abs(nearest - pair.base)
    result: Mask = excess > np.abs(pair.base) * np.float32(2**-6)
    return result


def _corrected_by_factor(
    decoded: Float32, far: Float32, by_max: Float32, size: Float32, *, least: float
) -> Mask:
    """Return which blocks are beyond what ``max`` leaves and, divided by one factor, are not.

    Args:
        decoded: sum of squares of each block as decoded.
        far: its squared distance from the base's.
        by_max: that of ``max``.
        size: sum of squares of the base's.
        least: how far from 1 the factor has to be.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        dot = (decoded + size - far) / 2
        factor = dot / size
        # The squared error of decoded / factor.
        left = decoded / np.square(factor) - 2 * dot / factor + size
        corrected = (np.abs(factor - 1) > least) & (factor > 0) & np.isfinite(left)
        corrected &= left < 0.25 * far / np.maximum(np.square(factor), 1)
        corrected &= ~beyond(np.asarray(left, np.float32), by_max, size)
        # So small a factor that nothing is left to correct.
        vanished = (decoded > 0) & (decoded < np.float32(2**-12) * size)
        result: Mask = beyond(far, by_max, size) & (corrected | vanished)
    return result


def _marked(blocks: Mask) -> Blocks:
    count = int(blocks.sum())
    if not count:
        return Blocks()
    row, block = np.unravel_index(int(np.argmax(blocks)), blocks.shape)
    return Blocks(count, (int(row), int(block)))


def _exempt(pair: WeightPair) -> Mask | None:
    """Return the blocks for which no factor may be looked for, [rows, blocks]; None for formats
    without block scales.
    """
    floor, scale_2 = _at_floor(pair), pair.parts.get("weight_scale_2")
    if floor is None or scale_2 is None or scale_2.size != 1:
        return floor
    amax = float(scale_2.reshape(-1)[0]) * NVFP4_RANGE
    if not yardstick.is_sliced(pair.format):
        return floor
    shared = yardstick.max_scales(pair.base, pair.format.name, amax)
    if shared is None:
        return floor
    width = pair.format.group_size or DEFAULT_BLOCK
    encoded = yardstick.nearest(pair.base, shared, pair.format.name)
    far, size = block_norms2(pair.decoded - encoded, width), block_norms2(pair.base, width)
    return floor | (far <= np.float32(1e-9) * size) if far.shape == floor.shape else floor


def _at_floor(pair: WeightPair) -> Mask | None:
    """Return the blocks with the smallest scale of their format, [rows, blocks]; None for formats
    without block scales.
    """
    scale = pair.parts.get("weight_scale", pair.parts.get("weight_scale_inv"))
    if scale is None or scale.dtype.itemsize != 1 or scale.ndim != 2:
        return None
    codes = scale.view(np.uint8)
    fine = pair.format.siblings[0].dtypes == ("F8_E4M3",)
    least: Mask = (codes & 0x7F) <= 1 if fine else codes == 0
    return least
