# SPDX-License-Identifier: Apache-2.0
"""Shared by the codecs: rows, parts of them and threads over parts, block maxima, input checks. Any
device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from exporter.codecs.constants import CHUNK
from verifier.errors import EncodeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix [rows, in], whole; or some columns of a single row that is wider than
    `CHUNK`.
    """

    start: int
    stop: int
    left: int
    right: int

    def scaled(self, per: int) -> Part:
        """Return the part of a [rows, in/per] table that belongs to this one; its last column may
        stand for fewer.
        """
        return Part(self.start, self.stop, self.left // per, -(-self.right // per))

    def of(self, table: torch.Tensor, per: int = 1) -> torch.Tensor:
        """Return what belongs to this part of a [rows, in/per] table, a view."""
        return table[self.start : self.stop, self.left // per : -(-self.right // per)]


def settle(done: torch.Tensor, into: torch.Tensor) -> None:
    """Copy what was filled elsewhere to where it belongs."""
    if done is not into:
        into.copy_(done)


class Rows:
    """A tensor [..., out, in] as [rows, in], without a copy of the whole whatever the strides."""

    def __init__(self, x: torch.Tensor) -> None:
        self.shape = (x.shape[:-1].numel(), x.shape[-1])
        self._x = x = x.detach()
        try:
            self._flat: torch.Tensor | None = x.view(self.shape)
        except RuntimeError:  # such as a stack of transposed matrices
            self._flat = None

    @property
    def viewed(self) -> bool:
        """Whether every part is a view."""
        return self._flat is not None

    def of(self, part: Part) -> torch.Tensor:
        """Return a part, in the dtype it has; a view where strides allow one."""
        if self._flat is not None:
            return part.of(self._flat)
        out, pieces = self._x.shape[-2], []
        for matrix in range(part.start // out, -(-part.stop // out)):
            rows = slice(max(0, part.start - matrix * out), part.stop - matrix * out)
            index = torch.unravel_index(torch.tensor(matrix), self._x.shape[:-2])
            pieces.append(self._x[tuple(int(i) for i in index)][rows, part.left : part.right])
        return torch.cat(pieces)


class Scratch:
    """Buffers of one worker, used again for part after part: fresh ones would cost a page fault for
    each 4 KiB.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return a tensor of undefined contents; the same memory whenever name, dtype and shape
        are.
        """
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self._held[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return held

    def place(
        self, name: str, into: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return ``into`` if it is contiguous (and of ``dtype``), else a tensor to be copied there
        when it is filled.
        """
        wanted = dtype or into.dtype
        return (
            into
            if into.is_contiguous() and into.dtype == wanted
            else self.take(name, wanted, *into.shape)
        )

    def floats(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` as contiguous float32: themselves, or a copy in this scratch."""
        if values.dtype == torch.float32 and values.is_contiguous():
            return values
        return self.take("floats", torch.float32, *values.shape).copy_(values)


def rows_of(x: torch.Tensor, fmt: str, block: int) -> Rows:
    """Return ``x`` as [rows, in].

    Raises:
        EncodeError: no floating dtype, fewer than two dimensions, or ``in`` not a multiple of
            ``block``.
    """
    if x.dtype not in FLOATS:
        raise EncodeError(
            f"{fmt}: a tensor of {x.dtype}; float32, bfloat16 or float16 belongs here"
        )
    if x.ndim < 2:
        raise EncodeError(f"{fmt}: a tensor of shape {list(x.shape)}; [out, in] is the least")
    if x.shape[-1] % block:
        raise EncodeError(
            f"{fmt}: the input dimension {x.shape[-1]} is not a multiple of the block {block}"
        )
    return Rows(x)


def parts_of(rows: int, width: int, size: int = CHUNK) -> Iterator[Part]:
    """Yield parts of at most ``size`` elements each, in order; none where there is no element."""
    if width == 0:
        return
    step = max(1, size // width)
    for start in range(0, rows, step):
        for left in range(0, width, size):
            yield Part(start, min(rows, start + step), left, min(width, left + size))


def each_part(
    shape: tuple[int, int],
    device: torch.device,
    threads: int | None,
    work: Callable[[Part, Scratch], None],
    size: int = CHUNK,
) -> None:
    """Call ``work`` for every part of [rows, in], by several threads of one intra-op thread each.

    Args:
        shape: rows and width.
        device: of the tensors; on any but the CPU one thread does the work.
        threads: how many; None takes as many as torch has intra-op threads (one in a worker of
            `exporter.stream`).
        work: what to do; parts do not overlap. Of errors the one of the first part is raised.
        size: elements of a part.
    """
    if threads is not None and threads < 1:
        raise EncodeError(f"threads is {threads}; 1 is the least")
    count = (
        min(threads or torch.get_num_threads(), -(-shape[0] * shape[1] // size))
        if device.type == "cpu"
        else 1
    )
    parts = enumerate(parts_of(*shape, size))
    if count <= 1:
        scratch = Scratch(device)
        with torch.no_grad():
            for _, part in parts:
                work(part, scratch)
        return
    lock, failed = threading.Lock(), []  # type: tuple[threading.Lock, list[tuple[int, BaseException]]]

    def worker() -> None:
        scratch = Scratch(device)
        while True:
            with lock:
                place, part = next(parts, (0, None))
            if part is None or failed:
                return
            try:
                with torch.no_grad():
                    work(part, scratch)
            except BaseException as error:  # noqa: BLE001
                failed.append((place, error))

    # Threads inherit the number of intra-op threads; two levels of them on a busy machine took 80
    # times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(worker) for _ in range(count)]:
                future.result()
    finally:
        torch.set_num_threads(before)
    if failed:
        raise min(failed, key=lambda f: f[0])[1]


def block_amax(x: torch.Tensor, block: int, scratch: Scratch) -> torch.Tensor:
    """Return max |x| over blocks of the last dimension, float32 [rows, in/block], in scratch; NaN
    stays NaN.

    Halving is four times as fast as ``amax`` over a short dimension on a CPU.

    Args:
        x: contiguous float32 [rows, in].
        block: a power of two that divides ``in``.
        scratch: where to work; its "wide" is written.
    """
    y = torch.abs(x, out=scratch.take("wide", torch.float32, *x.shape)).view(
        x.shape[0], x.shape[1] // block, block
    )
    while y.shape[-1] > 1:
        half = y.shape[-1] // 2
        y = torch.maximum(
            y[..., :half],
            y[..., half:],
            out=scratch.take(f"maxima{half}", torch.float32, *y.shape[:2], half),
        )
    result: torch.Tensor = y[..., 0]
    return result


def require_finite(maxima: torch.Tensor, x: torch.Tensor, part: Part, shape: torch.Size) -> None:
    """Raise where the block maxima show NaN or infinity, naming the first bad element by its index
    in ``shape``.

    Args:
        maxima: of ``x``, any shape.
        x: the values of ``part``.
        part: where they lie.
        shape: of the whole.

    Raises:
        EncodeError: NaN or infinity in ``x``.
    """
    if not maxima.numel() or bool(torch.isfinite(maxima.amax())):  # NaN is its own maximum
        return
    row, column = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
    value = "NaN" if bool(torch.isnan(x[row, column])) else "infinity"
    flat = (part.start + row) * shape[-1] + part.left + column
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    raise EncodeError(
        f"{value} at index {list(reversed(index))} of a weight of shape {list(shape)}"
    )


def tensor_amax(x: torch.Tensor, fmt: str, block: int, threads: int | None = None) -> torch.Tensor:
    """Return max |x| over the last two dimensions, float32 [...]; a stack has one for each matrix.

    Raises:
        EncodeError: NaN or infinity in ``x``, or a shape that `rows_of` refuses.
    """
    rows = rows_of(x, fmt, block)
    lead = x.shape[:-2]
    maxima, lock = torch.zeros(lead.numel(), dtype=torch.float32, device=x.device), threading.Lock()

    def work(part: Part, _: Scratch) -> None:
        values, matrix = rows.of(part), part.start // x.shape[-2]
        alone = matrix == (part.stop - 1) // x.shape[-2]
        low, high = torch.aminmax(values) if alone else (values.amin(-1), values.amax(-1))
        top = torch.maximum(low.abs(), high.abs()).float()
        require_finite(top, values, part, x.shape)
        index = (
            torch.tensor(matrix, device=x.device) if alone else matrix_of(part, x.shape, x.device)
        )
        with lock:
            maxima.scatter_reduce_(0, index.reshape(-1), top.reshape(-1), "amax")

    # Where nothing is copied, a part costs little more than its call.
    each_part(rows.shape, x.device, threads, work, 4 * CHUNK if rows.viewed else CHUNK)
    return maxima.reshape(lead)


def matrix_of(part: Part, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return to which matrix of a stack [..., out, in] each row of a part belongs, int64 [rows]."""
    return torch.arange(part.start, part.stop, device=device) // shape[-2]


def require_fit(
    found: torch.Tensor, fmt: str, leaf: str, shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    """Refuse a tensor of another shape, or of none of ``dtypes`` (any, where none is named).

    Raises:
        EncodeError: it does not fit.
    """
    if tuple(found.shape) != tuple(shape):
        raise EncodeError(f"{fmt}: {leaf} of shape {list(found.shape)}; {list(shape)} belongs here")
    if dtypes and found.dtype not in dtypes:
        raise EncodeError(
            f"{fmt}: {leaf} of {found.dtype}; {' or '.join(map(str, dtypes))} belongs here"
        )


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
    raise EncodeError(
        f"{fmt}: {leaf} of shape {list(value.shape)}; a scalar or {list(shape)} belongs here"
    )


def given_amax(
    value: torch.Tensor | float, fmt: str, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a given maximum, float32, a scalar or of ``shape``.

    Raises:
        EncodeError: negative, NaN or infinite, or of another shape.
    """
    top = torch.as_tensor(value, dtype=torch.float32, device=device)
    if not bool((torch.isfinite(top) & (top >= 0)).all()):
        raise EncodeError(f"{fmt}: the given amax is not a finite number of at least 0")
    return scalar_or(top, fmt, "amax", shape)


def take(
    parts: dict[str, torch.Tensor], fmt: str, leaves: tuple[str, ...], *dtypes: torch.dtype
) -> torch.Tensor:
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
    out: torch.Tensor | None,
    fmt: str,
    leaf: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor to write into, ``out`` or a new one, and its view as [rows, columns].

    Raises:
        EncodeError: ``out`` is of another shape, dtype or device, or its strides allow no such
            view.
    """
    found = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    require_fit(found, fmt, leaf, shape, dtype)
    if found.device != device:
        raise EncodeError(f"{fmt}: {leaf} on {found.device}; {device} belongs here")
    try:
        return found, found.view(found.shape[:-1].numel(), found.shape[-1])
    except RuntimeError as error:
        raise EncodeError(
            f"{fmt}: {leaf} of strides {found.stride()} cannot be viewed as rows"
        ) from error


def per_row(value: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
    """Return one value a matrix ([...] of a [..., out, in] stack, or a scalar) as float32 [rows, 1]
    of a part, or [1, 1].
    """
    if value.numel() == 1:
        return value.float().reshape(1, 1)
    return (
        value.float()
        .reshape(-1)
        .index_select(0, matrix_of(part, shape, value.device))
        .unsqueeze(-1)
    )
