# SPDX-License-Identifier: Apache-2.0
"""One block of one tensor: raw bytes, decoded values, the scale, and the values expected from the
base.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.decoding import Float32, decode
from verifier.errors import ContentError
from verifier.inspect.diff import precision_of
from verifier.layouts.expert_stacks import UnstackedCheckpoint, file_offset, unstacked
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.yardstick import max_scales, nearest
from verifier.schemes import FLOATS, SCALE_LEAVES, Format, Module, collapse, role, split
from verifier.suggest import with_numbers_of
from verifier.text import printable

WINDOW = 16  # elements shown of a tensor without blocks
MAX_ELEMENTS = 32  # elements shown of a block
Parts = dict[str, npt.NDArray[Any]]
_LOCATION = re.compile(
    r"^(?P<name>.*\S)\s+\[(?P<details>(?:row|block|byte|of|in) .*)\]$", re.DOTALL
)
_INDEX = re.compile(r"\b(row|block|byte) (\d{1,3}(?:,\d{3})+|\d{1,18})(?=,|$)")
_E4M3, _E8M0, _POSITIVE = "0x01 to 0x7E", "0x00 to 0xFE", "finite and above 0"


@dataclass(frozen=True, slots=True)
class Location:
    """A location as a report prints it; ``byte`` is the offset in the tensor's file."""

    name: str
    row: int | None = None
    block: int | None = None
    byte: int | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale: its leaf, its bytes in hexadecimal, its value."""

    leaf: str
    raw: str
    value: float


@dataclass(frozen=True, slots=True)
class StoredScale(Scale):
    """A scale as stored: also its offset in the file, and the valid range."""

    byte: int
    valid: str


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its column, its code or bytes, the number that the code encodes, and its value.

    ``base`` is the base's value; ``code`` and ``gives`` are the nearest code under the stored scale
    and its value.
    """

    column: int
    raw: str
    stands_for: float
    value: float
    base: float | None = None
    code: str | None = None
    gives: float | None = None


@dataclass(frozen=True, slots=True)
class ExpectedScale(Scale):
    """The scale of the base's block under a ``max`` scale search; the RMS error with it and as
    stored.
    """

    error: float
    stored_error: float


@dataclass(frozen=True)
class BlockView:
    """The contents of one block. ``format`` is the algorithm, or the dtype of a plain weight.

    ``asked`` are the columns that the location names exactly: one, or the two of a packed byte.
    """

    uri: str
    tensor: Tensor
    module: str
    role: str
    format: str
    siblings: tuple[str, ...]
    row: int
    block: int | None
    byte: int
    first: int
    width: int
    scales: tuple[StoredScale, ...]
    scale: float | None
    elements: tuple[Element, ...]
    notes: tuple[str, ...] = ()
    base: str | None = None
    expected: ExpectedScale | None = None
    asked: tuple[int, ...] = ()


def parse_location(text: str) -> Location:
    """Return the location that ``NAME`` or ``NAME [row 12, block 3, byte 2,078,571, of FILE]``
    names, as a report prints it.
    """
    match = _LOCATION.match(text.strip())
    if match is None:
        return Location(text.strip())
    before_file = re.split(r"(?:^|, )(?:of|in) ", match["details"], maxsplit=1)[0]
    indices = {k: int(n.replace(",", "")) for k, n in _INDEX.findall(before_file)}
    return Location(match["name"], indices.get("row"), indices.get("block"), indices.get("byte"))


def show(
    uri: str | os.PathLike[str],
    text: str,
    *,
    row: int | None = None,
    block: int | None = None,
    byte: int | None = None,
    base: str | os.PathLike[str] | None = None,
) -> BlockView:
    """Return one block of a checkpoint.

    Args:
        uri: a path or an fsspec URL.
        text: a tensor, a module, or a location as a report prints it.
        row: the row of the weight, or of the scale that ``text`` names.
        block: the block in the row.
        byte: the offset in the tensor's file, instead of both.
        base: the checkpoint with the expected values.

    Raises:
        UsageError: no such directory.
        ContentError: no such tensor or location, or not a checkpoint.
        MachineError: reading failed.
    """
    checkpoint = open_checkpoint(uri)
    reference = open_checkpoint(base) if base is not None else None
    if text.split(" ")[0] not in checkpoint.tensors:
        # A report names the linear layers in a stack of experts, not the stack.
        checkpoint = unstacked(checkpoint)
        reference = unstacked(reference) if reference is not None else None
    quantized = QuantizedCheckpoint(checkpoint)
    other = QuantizedCheckpoint(reference) if reference is not None else None
    tensor, parsed = _find(quantized.checkpoint, text)
    if isinstance(checkpoint, UnstackedCheckpoint) and file_offset(tensor.offset) is None:
        stack = checkpoint.stacked[tensor.name]
        raise ContentError(
            f"{tensor.name} is a part of {stack} and not contiguous in its file; show {stack}"
        )
    location = _replaced(parsed, row, block, byte)
    module = quantized.modules[split(tensor.name)[0]]
    fmt = quantized.format_of(module) or module.inferred_format
    if fmt is None or not _is_decodable(module, fmt, tensor):
        return _plain(quantized, other, module, tensor, location)
    # A report counts stored elements in a row of a weight; --block counts blocks.
    elementwise = parsed.block is not None and block is None
    return _block(quantized, other, module, fmt, tensor, location, elementwise)


def _replaced(parsed: Location, row: int | None, block: int | None, byte: int | None) -> Location:
    """Return a location with what the options say in place of what it names."""
    if byte is None and row is None and block is None:
        return parsed
    return replace(
        parsed,
        row=parsed.row if row is None else row,
        block=parsed.block if block is None else block,
        byte=byte,
    )


def _is_decodable(module: Module, fmt: Format, tensor: Tensor) -> bool:
    """Whether a tensor is the weight or a weight scale of a module that can be decoded."""
    leaf = split(tensor.name)[1]
    of_block = (
        tensor is module.weight
        or leaf in _OF_BLOCKS
        or (leaf in SCALE_LEAVES and tensor.elements == 1)
    )
    return of_block and module.dims is not None and _whole(module, fmt)


def _find(checkpoint: Checkpoint, text: str) -> tuple[Tensor, Location]:
    """Return the tensor that a text names literally, as a report prints it, or by its module."""
    tensors = checkpoint.tensors
    location = parse_location(text)
    for candidate in (Location(text), location):
        for suffix in ("", ".weight", ".weight_packed"):
            name = candidate.name + suffix
            if name in tensors:
                return tensors[name], replace(candidate, name=name)
    for name, tensor in tensors.items():
        if not name.isprintable() and printable(name) == location.name:
            return tensor, replace(location, name=name)
    names = _near(location.name, tensors)
    hint = f". Did you mean {', '.join(names)}?" if names else ""
    missing = printable(location.name, 200)
    raise ContentError(f"{checkpoint.uri}: no tensor {missing!r}{printable(hint, 600)}")


def _near(name: str, tensors: Collection[str]) -> list[str]:
    """Return the tensors that a mistyped name probably means: a whole name, or the end of one."""
    patterns: dict[str, str] = {}
    ends: dict[str, str] = {}
    parts = name.count(".") + 1
    for known in tensors:
        patterns.setdefault(collapse(known), known)
        for length in (parts, parts + 1):  # of the module, or of one of its tensors
            ends.setdefault(".".join(known.split(".")[-length:]), known)
    near = difflib.get_close_matches(collapse(name), list(patterns), n=3, cutoff=0.5)
    numbered = [with_numbers_of(name, pattern, tensors) for pattern in near]
    if not any(numbered):
        near_ends = difflib.get_close_matches(name, list(ends), n=3, cutoff=0.5)
        if near_ends:
            return [ends[end] for end in near_ends]
    return [known or patterns[n] for known, n in zip(numbered, near, strict=True)]


def _whole(module: Module, fmt: Format) -> bool:
    """Whether every scale that decoding needs is present with the right dtype and shape."""
    if module.dims is None:
        return False
    for sibling in fmt.siblings:
        present = [module.parts[leaf] for leaf in sibling.leaves if leaf in module.parts]
        if not present:
            if sibling.required and not sibling.leaves[0].startswith("input"):
                return False
        elif present[0].dtype not in sibling.dtypes or present[0].shape not in sibling.shapes(
            *module.dims
        ):
            return False
    return True


def _index(tensor: Tensor, byte: int) -> int:
    """Return the flat index of the element at an offset of the tensor's file."""
    if not tensor.offset <= byte < tensor.offset + tensor.nbytes:
        last = tensor.offset + tensor.nbytes - 1
        raise ContentError(
            f"byte {byte:,} is outside {tensor.name} (bytes {tensor.offset:,} to {last:,})"
        )
    return (byte - tensor.offset) // _itemsize(tensor)


def _itemsize(tensor: Tensor) -> int:
    return max(1, tensor.nbytes // max(1, tensor.elements))


def _require(unit: str, value: int, count: int, tensor: Tensor) -> int:
    if not 0 <= value < count:
        raise ContentError(
            f"{tensor.name} {list(tensor.shape)} has no {unit} {value:,}, only 0 to {count - 1:,}"
        )
    return value


def _read(checkpoint: Checkpoint, tensor: Tensor, first: int, count: int) -> npt.NDArray[Any]:
    """Return ``count`` elements from the flat index ``first`` on; raw bytes if numpy lacks the
    dtype.
    """
    size = _itemsize(tensor)
    data = checkpoint.source.read(tensor.file, tensor.offset + first * size, count * size)
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    return data if dtype is None else data.view(dtype)


def _hex(value: npt.NDArray[Any]) -> str:
    """Return one little-endian element as a number in hexadecimal."""
    return f"0x{value.reshape(1).view(np.uint8)[::-1].tobytes().hex().upper()}"


# weights that are not quantized, or cannot be decoded


def _plain(
    quantized: QuantizedCheckpoint,
    other: QuantizedCheckpoint | None,
    module: Module,
    tensor: Tensor,
    location: Location,
) -> BlockView:
    flat = _flat(tensor, location)
    row_length = tensor.shape[-1] if tensor.shape else 1
    start = flat - flat % row_length
    first = start + (flat - start) // WINDOW * WINDOW
    count = max(0, min(WINDOW, start + row_length - first, tensor.elements - first))
    values = _read(quantized.checkpoint, tensor, first, count)
    numbers = values.real.astype(np.float64)
    notes = []
    if tensor.dtype not in NUMPY_DTYPES:
        notes.append(f"{tensor.dtype} is shown as bytes")
    if module.quantized and tensor is module.weight:
        notes.append("this module cannot be decoded in any known format; run `ckptgate check`")
    base_part = _same_elements(other, tensor, first, count, notes) if other is not None else None
    elements = tuple(
        Element(
            first - start + i,
            _hex(values[i : i + 1]),
            float(numbers[i]),
            float(numbers[i]),
            None if base_part is None else float(base_part[i]),
        )
        for i in range(len(numbers))
    )
    kind = precision_of(quantized, module)
    exact = (location.row, location.block, location.byte) != (None, None, None)
    return BlockView(
        quantized.checkpoint.uri,
        tensor,
        module.name,
        role(module.name),
        kind,
        _siblings(module),
        start // max(1, row_length),
        None,
        tensor.offset + first * _itemsize(tensor),
        first - start,
        row_length,
        (),
        None,
        elements,
        tuple(notes),
        other.checkpoint.uri if other else None,
        asked=(flat - start,) if exact else (),
    )


def _flat(tensor: Tensor, location: Location) -> int:
    """Return the flat index of an element; row and block count as in a report."""
    if location.byte is not None:
        return _index(tensor, location.byte)
    rank = len(tensor.shape)
    if rank > 2 and (location.row or location.block):
        raise ContentError(
            f"{tensor.name} has {rank} dimensions; use --byte instead of --row and --block"
        )
    row, column = location.row or 0, location.block or 0
    if rank == 2:
        row = _require("row", row, tensor.shape[0], tensor)
        return row * tensor.shape[1] + _require("column", column, tensor.shape[1], tensor)
    if not tensor.elements:
        raise ContentError(f"{tensor.name} {list(tensor.shape)} has no elements")
    return _require("element", row or column, tensor.elements, tensor)


def _same_elements(
    other: QuantizedCheckpoint, tensor: Tensor, first: int, count: int, notes: list[str]
) -> npt.NDArray[np.float64] | None:
    base_part = other.checkpoint.tensors.get(tensor.name)
    if base_part is None:
        notes.append("the base has no tensor of this name")
    elif base_part.shape != tensor.shape:
        notes.append(f"the base has {base_part.dtype} {list(base_part.shape)}")
    elif base_part.dtype in NUMPY_DTYPES:
        values: npt.NDArray[np.float64] = _read(
            other.checkpoint, base_part, first, count
        ).real.astype(np.float64)
        return values
    return None


def _siblings(module: Module) -> tuple[str, ...]:
    return tuple(
        f"{leaf or 'itself'} {t.dtype} {list(t.shape)}" for leaf, t in module.parts.items()
    )


# a block of codes


def _block(
    quantized: QuantizedCheckpoint,
    other: QuantizedCheckpoint | None,
    module: Module,
    fmt: Format,
    tensor: Tensor,
    location: Location,
    elementwise: bool,
) -> BlockView:
    weight, dims = module.weight, module.dims
    if weight is None or dims is None:
        raise ContentError(f"{module.name} has no 2-D weight")
    row, column = _row_and_column(module, fmt, tensor, location, elementwise)
    size = fmt.group_size or WINDOW
    block = column // size
    span = _Span(row, block * size, min(dims[1], block * size + size))
    parts = _sliced(quantized.checkpoint, module, fmt, row, span.first, span.last)
    notes: list[str] = []
    base_values = _base_values(other, module, dims, span, notes) if other is not None else None
    if base_values is not None and not np.isfinite(base_values).all():
        notes.append("the base is not finite here")
    if span.last - span.first > MAX_ELEMENTS:
        notes.append(f"showing the first {MAX_ELEMENTS} of {span.last - span.first} columns")
    if fmt.block is None:
        notes.append(f"{fmt.algo} has no blocks along a row; showing {WINDOW} columns")
    scale, elements, expected = _decoded(parts, fmt, span.first, base_values)
    packing = 2 if fmt.packed else 1
    exact = tensor is weight and (location.byte is not None or elementwise)
    row_bytes = weight.shape[1] * _itemsize(weight)
    return BlockView(
        quantized.checkpoint.uri,
        tensor,
        module.name,
        role(module.name),
        fmt.algo,
        _siblings(module),
        row,
        None if fmt.block is None else block,
        weight.offset + row * row_bytes + span.first // packing,
        span.first,
        dims[1],
        _stored(quantized.checkpoint, module, fmt, row, block),
        scale,
        elements,
        tuple(notes),
        other.checkpoint.uri if other else None,
        expected,
        tuple(range(column, column + packing)) if exact else (),
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """Columns ``first`` to ``last`` (exclusive) of one row."""

    row: int
    first: int
    last: int


def _decoded(
    parts: Parts, fmt: Format, first: int, base: Float32 | None
) -> tuple[float, tuple[Element, ...], ExpectedScale | None]:
    """Return the total scale of a block, its elements, and the scale expected from the base."""
    values = decode(parts, fmt.name)[0]
    units = decode(_ones(parts, fmt), fmt.name)[0] if values.size else values
    codes = _codes(parts, fmt)
    numbers = codes.view(_code_dtype(fmt)).astype(np.float64)
    expected, nearest_values, nearest_codes = None, None, None
    if base is not None and np.isfinite(base).all():
        expected = _expected_scale(base, values, parts, fmt)
        if np.isfinite(units).all():
            nearest_values, nearest_codes = _nearest(base, parts, units, fmt)
    digits = 1 if fmt.packed else 2
    elements = tuple(
        Element(
            first + i,
            f"0x{int(codes[i]):0{digits}X}",
            float(numbers[i]),
            float(values[i]),
            None if base is None else float(base[i]),
            None if nearest_codes is None else f"0x{int(nearest_codes[i]):0{digits}X}",
            None if nearest_values is None else float(nearest_values[i]),
        )
        for i in range(min(MAX_ELEMENTS, len(values)))
    )
    return float(units[0]), elements, expected


def _code_dtype(fmt: Format) -> Any:
    return ml_dtypes.float4_e2m1fn if fmt.packed else ml_dtypes.float8_e4m3fn


def _row_and_column(
    module: Module, fmt: Format, tensor: Tensor, location: Location, elementwise: bool
) -> tuple[int, int]:
    """Return row and column of the weight, in elements, of a location in the weight or in one of
    its scales.
    """
    out, in_ = module.dims or (0, 0)
    height, width = fmt.block or (1, WINDOW)
    if tensor is module.weight:
        if location.byte is not None:
            flat = _index(tensor, location.byte)
            row, column = flat // tensor.shape[1], flat % tensor.shape[1] * (2 if fmt.packed else 1)
        else:
            step = (2 if fmt.packed else 1) if elementwise else width
            row, column = location.row or 0, (location.block or 0) * step
    else:
        grid = (-(-out // height), -(-in_ // width) if fmt.block else 1)
        if location.byte is not None:
            flat = _index(tensor, location.byte)
            row, block = divmod(flat, grid[1]) if tensor.elements == grid[0] * grid[1] else (0, 0)
        else:
            row, block = location.row or 0, location.block or 0
        row, column = row * height, block * width
    _require("row", row, out, module.weight or tensor)
    if not 0 <= column < in_:
        raise ContentError(
            f"{module.name} has no block {column // width:,}, only 0 to {-(-in_ // width) - 1:,}"
        )
    return row, column


def _sliced(
    checkpoint: Checkpoint, module: Module, fmt: Format, row: int, first: int, last: int
) -> Parts:
    """Return the parts of one block as `decode` takes them: one row and the block's scales."""
    weight, pack = module.weight, 2 if fmt.packed else 1
    if weight is None:
        raise ContentError(f"{module.name} has no weight")
    parts = {
        "weight": _read(
            checkpoint, weight, row * weight.shape[1] + first // pack, (last - first) // pack
        )[None]
    }
    height, width = fmt.block or (1, 0)
    for leaf, tensor in module.parts.items():
        if leaf not in SCALE_LEAVES:
            continue
        if tensor.elements == 1:
            value = _read(checkpoint, tensor, 0, 1)
            parts[leaf] = value.reshape(()) if fmt.block is None or leaf in _WHOLE else value[None]
        elif leaf in _OF_BLOCKS:
            columns = -(-(module.dims or (0, 0))[1] // width) if width else 1
            value = _read(
                checkpoint, tensor, row // height * columns + (first // width if width else 0), 1
            )
            parts[leaf] = value[None] if fmt.block else value
    return parts


_WHOLE = frozenset({"weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale"})
_OF_BLOCKS = frozenset({"weight_scale", "weight_scale_inv"})


def _codes(parts: Parts, fmt: Format) -> npt.NDArray[np.uint8]:
    """Return the code of each element of a block, one per byte."""
    raw = parts["weight"][0].view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=1).reshape(-1) if fmt.packed else raw


def _ones(parts: Parts, fmt: Format) -> Parts:
    """Return the parts with the code of 1.0 everywhere; they decode to the total scale."""
    return {
        **parts,
        "weight": np.full(parts["weight"].shape, 0x22 if fmt.packed else 0x38, np.uint8),
    }


def _nearest(
    base: Float32, parts: Parts, units: Float32, fmt: Format
) -> tuple[Float32, npt.NDArray[np.uint8]]:
    """Return the best values under the stored scale, and their codes."""
    best = nearest(base[None], parts, fmt.name)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(units == 0, np.float32(0), best / units)
    codes: npt.NDArray[np.uint8] = numbers.astype(_code_dtype(fmt)).view(np.uint8)
    return best, codes & np.uint8(15 if fmt.packed else 255)


def _base_values(
    other: QuantizedCheckpoint,
    module: Module,
    dims: tuple[int, int],
    span: _Span,
    notes: list[str],
) -> Float32 | None:
    """Return the base's values at the same row and columns, decoded if the base is quantized."""
    base_part = other.modules.get(module.name)
    if base_part is None or base_part.weight is None:
        notes.append("the base has no module of this name")
        return None
    if base_part.dims != dims:
        notes.append(f"the base has {base_part.weight.dtype} {list(base_part.weight.shape)}")
        return None
    if not base_part.quantized and base_part.weight.dtype in FLOATS:
        return _read(
            other.checkpoint,
            base_part.weight,
            span.row * dims[1] + span.first,
            span.last - span.first,
        ).astype(np.float32)
    values = other.values(base_part)
    if values is None:
        notes.append("the base's values cannot be decoded")
        return None
    return values[span.row, span.first : span.last]


def _expected_scale(
    base: Float32, values: Float32, parts: Parts, fmt: Format
) -> ExpectedScale | None:
    """Return the scale that a ``max`` search gives the base's block; None without block scales."""
    leaf = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
    if fmt.name == "mxfp8":
        scales = max_scales(base[None], "mxfp8")
        if scales is None:
            return None
        code = scales["weight_scale"].view(np.uint8)
        value = float(code.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0, 0])
    elif fmt.packed:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            one = {**parts, "weight_scale": np.full((1, 1), 0x38, np.uint8)}
            step = np.abs(base).max() / (np.float32(6) * decode(_ones(one, fmt), fmt.name)[0, 0])
        if not np.isfinite(step):
            return None
        scale = (
            np.clip(step, np.float32(2**-9), np.float32(448))
            .astype(ml_dtypes.float8_e4m3fn)
            .reshape(1, 1)
        )
        code, value = scale.view(np.uint8), float(scale[0, 0])
    else:
        return None
    best = nearest(base[None], {**parts, leaf: code}, fmt.name)[0]
    return ExpectedScale(leaf, _hex(code), value, _rms(best, base), _rms(values, base))


def _rms(a: Float32, b: Float32) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


def _stored(
    checkpoint: Checkpoint, module: Module, fmt: Format, row: int, block: int
) -> tuple[StoredScale, ...]:
    """Return the stored scales of a block."""
    scales = []
    height, width = fmt.block or (1, 0)
    for leaf, tensor in module.parts.items():
        if leaf not in SCALE_LEAVES or tensor.dtype not in NUMPY_DTYPES:
            continue
        columns = -(-(module.dims or (0, 0))[1] // width) if width else 1
        flat = 0 if tensor.elements == 1 else row // height * columns + (block if width else 0)
        if leaf not in _OF_BLOCKS and tensor.elements != 1:
            continue
        raw = _read(checkpoint, tensor, flat, 1)
        power = tensor.dtype in ("U8", "F8_E8M0")
        value = raw.view(ml_dtypes.float8_e8m0fnu) if power else raw
        valid = _E8M0 if power else (_E4M3 if tensor.dtype == "F8_E4M3" else _POSITIVE)
        number = float(value.astype(np.float64)[0])
        byte = tensor.offset + flat * _itemsize(tensor)
        scales.append(StoredScale(leaf, _hex(raw), number, byte, valid))
    return tuple(scales)
