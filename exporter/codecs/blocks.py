# SPDX-License-Identifier: Apache-2.0
"""Shared by the codecs: rows and chunks, block maxima, input checks. No state, any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporter.codecs.constants import CHUNK
from verifier.errors import EncodeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows_of(x: torch.Tensor, fmt: str, block: int) -> torch.Tensor:
    """Return ``x`` as [rows, in], a view where its strides allow.

    Raises:
        EncodeError: no floating dtype, fewer than two dimensions, or ``in`` not a multiple of ``block``.
    """
    if x.dtype not in FLOATS:
        raise EncodeError(f"{fmt}: a tensor of {x.dtype}; float32, bfloat16 or float16 belongs here")
    if x.ndim < 2:
        raise EncodeError(f"{fmt}: a tensor of shape {list(x.shape)}; [out, in] is the least")
    if x.shape[-1] % block:
        raise EncodeError(f"{fmt}: the input dimension {x.shape[-1]} is not a multiple of the block {block}")
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows of about `CHUNK` elements each; none where there is no element."""
    if width == 0:
        return
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def block_amax(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return max |x| over blocks of the last dimension, float32 [rows, in/block]; NaN stays NaN.

    Halving is four times as fast as ``amax`` over a short dimension on a CPU.
    """
    y = x.float().abs().reshape(*x.shape[:-1], x.shape[-1] // block, block)
    while y.shape[-1] > 1:
        half = y.shape[-1] // 2
        y = torch.maximum(y[..., :half], y[..., half:])
    result: torch.Tensor = y[..., 0]
    return result


def require_finite(maxima: torch.Tensor, x: torch.Tensor, first_row: int, shape: torch.Size) -> None:
    """Raise where the block maxima show NaN or infinity, naming the first bad element by its index in ``shape``.

    Raises:
        EncodeError: NaN or infinity in ``x``.
    """
    if bool(torch.isfinite(maxima).all()):
        return
    place = int((~torch.isfinite(x)).reshape(-1).nonzero()[0, 0])
    value = "NaN" if bool(torch.isnan(x.reshape(-1)[place])) else "infinity"
    flat = place + first_row * x.shape[-1]
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    raise EncodeError(f"{value} at index {list(reversed(index))} of a weight of shape {list(shape)}")


def tensor_amax(x: torch.Tensor, fmt: str, block: int) -> torch.Tensor:
    """Return max |x| over the last two dimensions, float32 [...]; a stack has one for each matrix.

    Raises:
        EncodeError: NaN or infinity in ``x``, or a shape that `rows_of` refuses.
    """
    flat = rows_of(x, fmt, block)
    maxima = torch.zeros(flat.shape[0], dtype=torch.float32, device=x.device)
    for part in chunks(*flat.shape):
        top = flat[part].abs().amax(-1).float()
        require_finite(top, flat[part], part.start, x.shape)
        maxima[part] = top
    stacked = maxima.reshape(*x.shape[:-1])
    if stacked.shape[-1] == 0:
        return torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
    return stacked.amax(-1)


def require_fit(found: torch.Tensor, fmt: str, leaf: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another shape, or of none of ``dtypes`` (any, where none is named).

    Raises:
        EncodeError: it does not fit.
    """
    if tuple(found.shape) != tuple(shape):
        raise EncodeError(f"{fmt}: {leaf} of shape {list(found.shape)}; {list(shape)} belongs here")
    if dtypes and found.dtype not in dtypes:
        raise EncodeError(f"{fmt}: {leaf} of {found.dtype}; {' or '.join(map(str, dtypes))} belongs here")


def require_positive(scale: torch.Tensor, fmt: str, leaf: str) -> None:
    """Refuse float32 scales that a reader would: zero, negative, NaN or infinite.

    Raises:
        EncodeError: one of them is.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise EncodeError(f"{fmt}: the given {leaf} is not finite and positive throughout")


def scalar_or(value: torch.Tensor, fmt: str, leaf: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``value`` as a scalar, for which [1] stands too, or in ``shape``.

    Raises:
        EncodeError: another shape.
    """
    if tuple(value.shape) in ((), tuple(shape)):
        return value
    if tuple(value.shape) == (1,):
        return value.reshape(())
    raise EncodeError(f"{fmt}: {leaf} of shape {list(value.shape)}; a scalar or {list(shape)} belongs here")


def given_amax(value: torch.Tensor | float, fmt: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return a given maximum, float32, a scalar or of ``shape``.

    Raises:
        EncodeError: negative, NaN or infinite, or of another shape.
    """
    top = torch.as_tensor(value, dtype=torch.float32, device=device)
    if not bool((torch.isfinite(top) & (top >= 0)).all()):
        raise EncodeError(f"{fmt}: the given amax is not a finite number of at least 0")
    return scalar_or(top, fmt, "amax", shape)


def take(parts: dict[str, torch.Tensor], fmt: str, leaves: tuple[str, ...], *dtypes: torch.dtype) -> torch.Tensor:
    """Return the first of ``leaves`` that ``parts`` has.

    Raises:
        EncodeError: it has none, or one of another dtype than ``dtypes``.
    """
    for leaf in leaves:
        if leaf in parts:
            require_fit(parts[leaf], fmt, leaf, parts[leaf].shape, *dtypes)
            return parts[leaf]
    raise EncodeError(f"{fmt}: {leaves[0]} is missing")


def target(
    out: torch.Tensor | None, fmt: str, leaf: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor to write into, ``out`` or a new one, and its view as [rows, columns].

    Raises:
        EncodeError: ``out`` is of another shape, dtype or device, or its strides allow no such view.
    """
    found = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    require_fit(found, fmt, leaf, shape, dtype)
    if found.device != device:
        raise EncodeError(f"{fmt}: {leaf} on {found.device}; {device} belongs here")
    try:
        return found, found.view(found.shape[:-1].numel(), found.shape[-1])
    except RuntimeError as error:
        raise EncodeError(f"{fmt}: {leaf} of strides {found.stride()} cannot be viewed as rows") from error


def per_row(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return one value a matrix ([...] of a [..., out, in] stack, or a scalar) as float32 [rows, 1]."""
    lead = shape[:-2]
    expanded = value.float().reshape(value.shape if value.ndim else (1,) * len(lead)).expand(lead)
    return expanded.reshape(-1, 1).repeat_interleave(shape[-2], dim=0) if lead else expanded.reshape(1, 1)
