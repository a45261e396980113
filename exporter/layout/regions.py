# SPDX-License-Identifier: Apache-2.0
"""A region of a tensor on disk, read without more of the file than it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import DTYPE_BITS, Checkpoint, Tensor
from verifier.errors import EncodeError

Run = tuple[int, int, int, bool]
"""Start, step and length along one axis, and whether the axis is dropped."""


def read_region(
    ckpt: Checkpoint, tensor: Tensor, runs: Sequence[Run], order: Sequence[int]
) -> npt.NDArray[Any]:
    """Return a region of a tensor, contiguous, as unsigned integers of the dtype's width.

    Args:
        ckpt: what the tensor is in.
        tensor: of any shape.
        runs: one for each axis; none takes all.
        order: how what is left is permuted; none leaves it.

    Raises:
        EncodeError: a dtype whose values are no whole bytes.
    """
    bits = DTYPE_BITS[tensor.dtype]
    if bits % 8:
        raise EncodeError(
            f"{tensor.name}: {tensor.dtype} holds less than a byte for a value; it cannot be cut"
        )
    width, offset, shape, cuts = bits // 8, tensor.offset, list(tensor.shape), list(runs)
    while cuts and cuts[0][3]:  # one entry of a leading axis is one stretch of the file
        inner = math.prod(shape[1:])
        offset, shape = offset + cuts.pop(0)[0] * inner * width, shape[1:]
    if cuts:
        start, step, length, _ = cuts[0]
        inner, rows = math.prod(shape[1:]), (length - 1) * step + 1 if length else 0
        offset, shape = offset + start * inner * width, [rows, *shape[1:]]
        cuts[0] = (0, step, length, False)
    raw = ckpt.source.read(tensor.file, offset, math.prod(shape) * width)
    return cut(np.frombuffer(raw.tobytes(), f"u{width}").reshape(shape), cuts, order)


def cut(values: npt.NDArray[Any], runs: Sequence[Run], order: Sequence[int]) -> npt.NDArray[Any]:
    """Return a region of an array, contiguous."""
    at = tuple(
        s if drop else slice(s, s + (n - 1) * k + 1 if n else s, k) for s, k, n, drop in runs
    )
    left = values[at] if at else values
    return np.ascontiguousarray(left.transpose(tuple(order)) if order else left)
