# SPDX-License-Identifier: Apache-2.0
"""The tensors of a module as decoders take them: by leaf, in the dtypes on disk, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.decoding.tables import Float32, e4m3_table, e8m0_table
from verifier.errors import ContentError
from verifier.schemes import Format

Array = npt.NDArray[Any]
Parts = Mapping[str, Array]
Bytes = npt.NDArray[np.uint8]
_HALVES = (ml_dtypes.bfloat16, np.float16)


def part(parts: Parts, *names: str, fmt: Format) -> Array:
    """Return the first of some tensors that is there.

    Raises:
        ContentError: none is.
    """
    for name in names:
        if name in parts:
            return np.asarray(parts[name])
    raise ContentError(f"{fmt.name}: {names[0]} is missing")


def weight_part(parts: Parts, fmt: Format) -> Array:
    """Return the weight of codes, of two dimensions or more."""
    weight = part(parts, "weight", *fmt.weight.leaves, fmt=fmt)
    if weight.ndim < 2:
        raise ContentError(
            f"{fmt.name}: a weight of {weight.ndim} dimensions; [out, in] is the least"
        )
    return weight


def scale_part(parts: Parts, fmt: Format) -> Array:
    """Return the weight's scale."""
    return part(parts, *fmt.siblings[0].leaves, fmt=fmt)


def as_bytes(array: Array) -> Bytes:
    """Return a tensor of one-byte values as uint8."""
    if array.dtype.itemsize != 1:
        raise ContentError(f"a tensor of {array.dtype} where one byte a value belongs")
    return array.view(np.uint8)


def as_words(array: Array, fmt: Format) -> Array:
    """Return packed four-byte words, contiguous."""
    if array.dtype.itemsize != 4 or array.dtype.kind not in "iu":
        raise ContentError(f"{fmt.name}: a tensor of {array.dtype} where words of 32 bits belong")
    return np.ascontiguousarray(array)


def as_floats(array: Array) -> Float32:
    """Return scales as float32, also from the raw bytes of float32 along the last axis."""
    if array.dtype == np.uint8:
        if array.ndim == 0 or array.shape[-1] % 4:
            raise ContentError(f"a scale of {list(array.shape)} bytes where float32 belongs")
        array = np.ascontiguousarray(array).view(np.float32)
    if array.dtype in _HALVES:
        return array.astype(np.float32)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return e4m3_table()[array.view(np.uint8)]
    if array.dtype == ml_dtypes.float8_e8m0fnu:
        return e8m0_table()[array.view(np.uint8)]
    if array.dtype != np.float32:
        raise ContentError(f"a scale of {array.dtype} where float32 belongs")
    return array


def fitted(scale: Float32, shape: tuple[int, ...], fmt: Format) -> Float32:
    """Return a scale in ``shape``; on disk it may have more axes of length 1, or fewer."""
    if [n for n in scale.shape if n != 1] != [n for n in shape if n != 1]:
        raise ContentError(
            f"{fmt.name}: a scale of shape {list(scale.shape)}; {list(shape)} belongs here"
        )
    return scale.reshape(shape)


def by_matrix(array: Array, lead: tuple[int, ...], fmt: Format) -> Float32:
    """Return one scale for each matrix of a stack, or one for all, such that it broadcasts over
    [..., out, in].
    """
    scale = as_floats(array)
    return scale.reshape(()) if scale.size == 1 else fitted(scale, lead, fmt)[..., None, None]
