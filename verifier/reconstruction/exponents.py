# SPDX-License-Identifier: Apache-2.0
"""E8M0 exponents of 0 (2^-127) next to the values that they scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verifier.payload.reader import PayloadReader
from verifier.schemes import FORMATS, Format, Module

_SIXES = bytes([0xDF, 0xF7, 0x7D])
_MAGNITUDES = {"e2m1": b"\x77", "e4m3": b"\x7f", "e2m3": _SIXES, "e3m2": _SIXES}
"""The bits of the magnitude in the bytes of each code; those of four six-bit codes are three
bytes."""
ROWS = 1024


@dataclass(frozen=True, slots=True)
class _Grid:
    """Scales [tiles, blocks] over a weight [rows, row bytes]; a scale is of ``high`` rows and of
    ``wide`` bytes.
    """

    rows: int
    row_bytes: int
    tiles: int
    blocks: int
    high: int
    wide: int


def e8m0_zeros(
    payload: PayloadReader, module: Module, fmt: Format | None
) -> tuple[int, int, int] | None:
    """Return (blocks whose E8M0 exponent is 0 and whose values are not, the first of them, blocks
    with any value); None without any such block.

    Args:
        payload: reads the bytes.
        module: with an E8M0 scale.
        fmt: its format; None takes FP8 for MXFP8.
    """
    scale, weight = module.scale, module.weight
    if scale is None or weight is None or scale.dtype not in ("U8", "F8_E8M0"):
        return None
    if fmt is None and weight.dtype == "F8_E4M3":
        fmt = FORMATS["mxfp8"]
    known = fmt
    if known is None:
        return None
    return payload.results.of_name(
        "e8m0 zeros", module.name, lambda: _zeros(payload, module, known)
    )


def _zeros(payload: PayloadReader, module: Module, fmt: Format) -> tuple[int, int, int] | None:
    scale, weight = module.scale, module.weight
    if scale is None or weight is None or payload.extremes(scale)[0] != 0:
        return None
    grid = _grid(module, fmt)
    if grid is None:
        return None
    zero = np.flatnonzero(payload.bytes_of(scale) == 0)
    used = _used(payload.bytes_of(weight), grid, _MAGNITUDES[fmt.weight.codes])
    lost = zero[used.reshape(-1)[zero]]
    return (int(lost.size), int(lost[0]), int(used.sum())) if lost.size else None


def _grid(module: Module, fmt: Format) -> _Grid | None:
    """Return how the scales lie over the bytes of the weight; None where they do not fit it."""
    scale, weight, dims = module.scale, module.weight, module.dims
    if scale is None or weight is None or dims is None or fmt.block is None:
        return None
    if fmt.weight.codes not in _MAGNITUDES or fmt.transposed:
        return None
    rows, columns = dims
    high, group = fmt.block
    tiles, blocks = -(-rows // high), -(-columns // group)
    if scale.elements != tiles * blocks or not rows or weight.nbytes % rows:
        return None
    row_bytes = weight.nbytes // rows
    wide = group * fmt.bits // 8
    if not wide or -(-row_bytes // wide) != blocks:
        return None
    return _Grid(rows, row_bytes, tiles, blocks, high, wide)


def _used(weight: npt.NDArray[np.uint8], grid: _Grid, magnitude: bytes) -> npt.NDArray[np.bool_]:
    """Return which blocks have a value other than zero, [tiles, blocks]."""
    codes = weight.reshape(grid.rows, grid.row_bytes)
    mask = np.resize(np.frombuffer(magnitude, np.uint8), grid.row_bytes)
    by_row = np.zeros((grid.rows, grid.blocks), bool)
    for start in range(0, grid.rows, ROWS):
        part = slice(start, start + ROWS)
        nonzero = (codes[part] & mask) != 0
        padded = np.pad(nonzero, ((0, 0), (0, grid.blocks * grid.wide - grid.row_bytes)))
        by_row[part] = padded.reshape(-1, grid.blocks, grid.wide).any(axis=2)
    result: npt.NDArray[np.bool_] = np.logical_or.reduceat(
        by_row, np.arange(0, grid.rows, grid.high), axis=0
    )
    return result
