# SPDX-License-Identifier: Apache-2.0
"""A region of a tensor on disk, read without more of the file than it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import DTYPE_BITS, Checkpoint, Tensor
from verifier.errors import EncodeError


class Cut(NamedTuple):
    """Entries of one axis: ``length`` of them, every ``step``-th from ``start``.

    ``drop`` removes the axis (``length`` is then 1).
    """

    start: int
    step: int
    length: int
    drop: bool = False

    @property
    def selector(self) -> slice | int:
        """The cut as an index for numpy or torch."""
        if self.drop:
            return self.start
        end = self.start + (self.length - 1) * self.step + 1 if self.length else self.start
        return slice(self.start, end, self.step)


def read_region(
    ckpt: Checkpoint, tensor: Tensor, cuts: Sequence[Cut], order: Sequence[int]
) -> npt.NDArray[Any]:
    """Return a region of a tensor, contiguous, as unsigned integers of the dtype's width.

    Args:
        ckpt: the checkpoint of the tensor.
        tensor: of any shape.
        cuts: one per axis; none takes the whole tensor.
        order: how the remaining axes are permuted; none keeps their order.

    Raises:
        EncodeError: a dtype with less than one byte per value.
    """
    bits = DTYPE_BITS[tensor.dtype]
    if bits % 8:
        raise EncodeError(
            f"{tensor.name}: {tensor.dtype} has less than one byte per value and cannot be cut"
        )
    width, offset, shape, rest = bits // 8, tensor.offset, list(tensor.shape), list(cuts)
    while rest and rest[0].drop:  # one entry of a leading axis is one stretch of the file
        inner = math.prod(shape[1:])
        offset, shape = offset + rest.pop(0).start * inner * width, shape[1:]
    if rest:
        start, step, length, _ = rest[0]
        inner, rows = math.prod(shape[1:]), (length - 1) * step + 1 if length else 0
        offset, shape = offset + start * inner * width, [rows, *shape[1:]]
        rest[0] = Cut(0, step, length)
    raw = ckpt.source.read(tensor.file, offset, math.prod(shape) * width)
    values = np.frombuffer(raw.tobytes(), f"u{width}").reshape(shape)
    region = values[tuple(c.selector for c in rest)] if rest else values
    return np.ascontiguousarray(region.transpose(tuple(order)) if order else region)
