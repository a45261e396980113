# SPDX-License-Identifier: Apache-2.0
"""Used by all codecs: chunks of rows, threads over chunks, block maxima, checks of the input. Any
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
class Chunk:
    """Whole rows of a matrix [rows, in], or columns of one row that is wider than `CHUNK`."""

    start: int
    stop: int
    left: int
    right: int

    def scaled(self, per: int) -> Chunk:
        """Return the same chunk of a [rows, in/per] table; its last column may cover fewer than
        ``per``.
        """
        return Chunk(self.start, self.stop, self.left // per, -(-self.right // per))

    def slice(self, table: torch.Tensor, per: int = 1) -> torch.Tensor:
        """Return this chunk of a [rows, in/per] table, as a view."""
        return table[self.start : self.stop, self.left // per : -(-self.right // per)]


def copy_back(buffer: torch.Tensor, output: torch.Tensor) -> None:
    """Copy a buffer of `Scratch.contiguous` to its output, unless it is the output itself."""
    if buffer is not output:
        output.copy_(buffer)


class Rows:
    """A tensor [..., out, in] as [rows, in], never copied as a whole, whatever its strides."""

    def __init__(self, x: torch.Tensor) -> None:
        self.shape = (x.shape[:-1].numel(), x.shape[-1])
        self._x = x = x.detach()
        try:
            self._flat: torch.Tensor | None = x.view(self.shape)
        except RuntimeError:  # such as a stack of transposed matrices
            self._flat = None

    @property
    def viewed(self) -> bool:
        """Whether every chunk is a view."""
        return self._flat is not None

    def read(self, chunk: Chunk) -> torch.Tensor:
        """Return a chunk in the tensor's dtype; a view where the strides allow one."""
        if self._flat is not None:
            return chunk.slice(self._flat)
        height = self._x.shape[-2]
        slices = []
        for matrix in range(chunk.start // height, -(-chunk.stop // height)):
            rows = slice(max(0, chunk.start - matrix * height), chunk.stop - matrix * height)
            index = torch.unravel_index(torch.tensor(matrix), self._x.shape[:-2])
            values = self._x[tuple(int(i) for i in index)]
            slices.append(values[rows, chunk.left : chunk.right])
        return torch.cat(slices)


class Scratch:
    """The buffers of one worker, reused per chunk: new memory costs a page fault per 4 KiB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return a tensor of undefined contents; the same memory for the same name, dtype and
        shape.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer

    def contiguous(
        self, name: str, output: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return ``output`` if it is contiguous and of ``dtype``, else a buffer for `copy_back`."""
        dtype = dtype or output.dtype
        if output.is_contiguous() and output.dtype == dtype:
            return output
        return self.take(name, dtype, *output.shape)

    def floats(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` if they are contiguous float32, else a copy in this scratch."""
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
            f"{fmt}: cannot encode {_name(x.dtype)}; use float32, bfloat16 or float16"
        )
    if x.ndim < 2:
        raise EncodeError(f"{fmt}: cannot encode shape {list(x.shape)}; use [..., out, in]")
    if x.shape[-1] % block:
        raise EncodeError(
            f"{fmt}: the input dimension {x.shape[-1]} is not a multiple of the block size {block}"
        )
    return Rows(x)


def chunks_of(rows: int, width: int, size: int = CHUNK) -> Iterator[Chunk]:
    """Yield chunks of at most ``size`` elements each, in order; none of an empty matrix."""
    if width == 0:
        return
    step = max(1, size // width)
    for start in range(0, rows, step):
        for left in range(0, width, size):
            yield Chunk(start, min(rows, start + step), left, min(width, left + size))


def each_chunk(
    shape: tuple[int, int],
    device: torch.device,
    threads: int | None,
    work: Callable[[Chunk, Scratch], None],
    size: int = CHUNK,
) -> None:
    """Call ``work`` for every chunk of [rows, in], in threads of one intra-op thread each.

    Args:
        shape: rows and width.
        device: of the tensors; on any but the CPU one thread does the work.
        threads: how many; None takes as many as torch has intra-op threads (one in a worker of
            `exporter.stream`).
        work: called with a chunk and the buffers of its thread; chunks do not overlap. If several
            calls fail, the error of the first chunk is raised.
        size: elements per chunk.
    """
    if threads is not None and threads < 1:
        raise EncodeError(f"threads is {threads}; use at least 1")
    count = 1
    if device.type == "cpu":
        count = min(threads or torch.get_num_threads(), -(-shape[0] * shape[1] // size))
    chunks = chunks_of(*shape, size)
    if count > 1:
        _in_threads(chunks, device, work, count)
        return
    scratch = Scratch(device)
    with torch.no_grad():
        for chunk in chunks:
            work(chunk, scratch)


def _in_threads(
    chunks: Iterator[Chunk],
    device: torch.device,
    work: Callable[[Chunk, Scratch], None],
    count: int,
) -> None:
    """Call ``work`` for every chunk in ``count`` threads; raise the error of the first chunk."""
    numbered = enumerate(chunks)
    lock = threading.Lock()
    errors: list[tuple[int, BaseException]] = []

    def worker() -> None:
        scratch = Scratch(device)
        while True:
            with lock:
                number, chunk = next(numbered, (0, None))
            if chunk is None or errors:
                return
            try:
                with torch.no_grad():
                    work(chunk, scratch)
            except BaseException as error:  # noqa: BLE001
                errors.append((number, error))

    # Threads inherit the number of intra-op threads; two levels of threads on a busy machine took
    # 80 times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(worker) for _ in range(count)]:
                future.result()
    finally:
        torch.set_num_threads(before)
    if errors:
        raise min(errors, key=lambda e: e[0])[1]


def block_amax(x: torch.Tensor, block: int, scratch: Scratch) -> torch.Tensor:
    """Return max |x| over blocks of the last dimension, float32 [rows, in/block], in scratch.

    NaN stays NaN. On a CPU, halving is four times as fast as ``amax`` over a short dimension.

    Args:
        x: contiguous float32 [rows, in].
        block: a power of two that divides ``in``.
        scratch: where to work; its "wide" is written.
    """
    magnitudes = torch.abs(x, out=scratch.take("wide", torch.float32, *x.shape))
    y = magnitudes.view(x.shape[0], x.shape[1] // block, block)
    while y.shape[-1] > 1:
        half = y.shape[-1] // 2
        maxima = scratch.take(f"maxima{half}", torch.float32, *y.shape[:2], half)
        y = torch.maximum(y[..., :half], y[..., half:], out=maxima)
    result: torch.Tensor = y[..., 0]
    return result


def require_finite(maxima: torch.Tensor, x: torch.Tensor, chunk: Chunk, shape: torch.Size) -> None:
    """Raise if the maxima contain NaN or infinity, naming the first such element of the weight.

    Args:
        maxima: of ``x``, any shape.
        x: the values of ``chunk``.
        chunk: where ``x`` is in the weight.
        shape: of the weight.

    Raises:
        EncodeError: NaN or infinity in ``x``.
    """
    if not maxima.numel() or bool(torch.isfinite(maxima.amax())):  # NaN is its own maximum
        return
    row, column = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
    value = "NaN" if bool(torch.isnan(x[row, column])) else "infinity"
    flat = (chunk.start + row) * shape[-1] + chunk.left + column
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    raise EncodeError(
        f"{value} at index {list(reversed(index))} of a weight of shape {list(shape)}"
    )


def tensor_amax(x: torch.Tensor, fmt: str, block: int, threads: int | None = None) -> torch.Tensor:
    """Return max |x| over the last two dimensions, float32 [...]: one per matrix of a stack.

    Raises:
        EncodeError: NaN or infinity in ``x``, or a shape that `rows_of` refuses.
    """
    rows = rows_of(x, fmt, block)
    lead = x.shape[:-2]
    maxima = torch.zeros(lead.numel(), dtype=torch.float32, device=x.device)
    lock = threading.Lock()

    def work(chunk: Chunk, _: Scratch) -> None:
        values, matrix = rows.read(chunk), chunk.start // x.shape[-2]
        if matrix == (chunk.stop - 1) // x.shape[-2]:
            low, high = torch.aminmax(values)
            index = torch.tensor(matrix, device=x.device)
        else:
            low, high = values.amin(-1), values.amax(-1)
            index = matrix_of(chunk, x.shape, x.device)
        top = torch.maximum(low.abs(), high.abs()).float()
        require_finite(top, values, chunk, x.shape)
        with lock:
            maxima.scatter_reduce_(0, index.reshape(-1), top.reshape(-1), "amax")

    # Where nothing is copied, a chunk costs little more than its call.
    each_chunk(rows.shape, x.device, threads, work, 4 * CHUNK if rows.viewed else CHUNK)
    return maxima.reshape(lead)


def matrix_of(chunk: Chunk, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return the matrix of a stack [..., out, in] that each row of a chunk is in, int64 [rows]."""
    return torch.arange(chunk.start, chunk.stop, device=device) // shape[-2]


def per_row(value: torch.Tensor, chunk: Chunk, shape: torch.Size) -> torch.Tensor:
    """Return one value per matrix of a stack as one per row of a chunk.

    Args:
        value: a scalar, or [...] of a stack [..., out, in].
        chunk: the rows.
        shape: of the stack.

    Returns:
        float32 [rows, 1]; [1, 1] of a single value.
    """
    if value.numel() == 1:
        return value.float().reshape(1, 1)
    matrix = matrix_of(chunk, shape, value.device)
    return value.float().reshape(-1).index_select(0, matrix).unsqueeze(-1)


def require_fit(
    tensor: torch.Tensor, fmt: str, leaf: str, shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    """Refuse a tensor of a different shape, or of none of ``dtypes`` (any, where none is named).

    Raises:
        EncodeError: it does not fit.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise EncodeError(f"{fmt}: {leaf} has shape {list(tensor.shape)}; expected {list(shape)}")
    if dtypes and tensor.dtype not in dtypes:
        expected = " or ".join(map(_name, dtypes))
        raise EncodeError(f"{fmt}: {leaf} is {_name(tensor.dtype)}; expected {expected}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_positive(scale: torch.Tensor, fmt: str, leaf: str) -> None:
    """Refuse float32 scales of which one is zero, negative, NaN or infinite.

    Raises:
        EncodeError: one of them is.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise EncodeError(f"{fmt}: {leaf} has values that are not positive and finite")


def scalar_or(value: torch.Tensor, fmt: str, leaf: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``value``, which is a scalar, [1] (returned as a scalar) or of ``shape``.

    Raises:
        EncodeError: a different shape.
    """
    if tuple(value.shape) in ((), tuple(shape)):
        return value
    if tuple(value.shape) == (1,):
        return value.reshape(())
    raise EncodeError(
        f"{fmt}: {leaf} has shape {list(value.shape)}; expected a scalar or {list(shape)}"
    )


def checked_amax(
    value: torch.Tensor | float, fmt: str, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a caller's maximum as float32, a scalar or of ``shape``.

    Raises:
        EncodeError: negative, NaN or infinite, or of a different shape.
    """
    top = torch.as_tensor(value, dtype=torch.float32, device=device)
    if not bool((torch.isfinite(top) & (top >= 0)).all()):
        raise EncodeError(f"{fmt}: amax is not a finite number of at least 0")
    return scalar_or(top, fmt, "amax", shape)


def take(
    parts: dict[str, torch.Tensor], fmt: str, leaves: tuple[str, ...], *dtypes: torch.dtype
) -> torch.Tensor:
    """Return the first of ``leaves`` that is in ``parts``.

    Raises:
        EncodeError: none is, or its dtype is none of ``dtypes``.
    """
    for leaf in leaves:
        if leaf in parts:
            require_fit(parts[leaf], fmt, leaf, parts[leaf].shape, *dtypes)
            return parts[leaf]
    raise EncodeError(f"{fmt}: {leaves[0]} is missing")


def output(
    out: torch.Tensor | None,
    fmt: str,
    leaf: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor to write into, ``out`` or a new one, and its view as [rows, columns].

    Raises:
        EncodeError: ``out`` has a different shape, dtype or device, or its strides allow no such
            view.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    require_fit(tensor, fmt, leaf, shape, dtype)
    if tensor.device != device:
        raise EncodeError(f"{fmt}: {leaf} is on {tensor.device}; expected {device}")
    try:
        return tensor, tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1])
    except RuntimeError as error:
        raise EncodeError(
            f"{fmt}: {leaf} has strides {tensor.stride()}, which cannot be viewed as rows"
        ) from error
