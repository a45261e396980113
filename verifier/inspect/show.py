# SPDX-License-Identifier: Apache-2.0
"""One block of one tensor: the bytes, what they stand for, the scale, the values, and what belongs
there.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.decoding import Float32, decode
from verifier.errors import ContentError
from verifier.inspect.diff import precision_of
from verifier.layouts.expert_stacks import Unstacked, place_in_file, unstacked
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.yardstick import max_scales, nearest
from verifier.schemes import FLOATS, SCALE_LEAVES, Format, Module, collapse, role, split
from verifier.text import printable

WINDOW = 16  # elements shown of what has no blocks
MOST = 32  # elements shown of a block
Parts = dict[str, npt.NDArray[Any]]
_PLACE = re.compile(r"^(?P<name>.*\S)\s+\[(?P<spots>(?:row|block|byte|of|in) .*)\]$", re.DOTALL)
_SPOT = re.compile(r"\b(row|block|byte) (\d{1,3}(?:,\d{3})+|\d{1,18})(?=,|$)")
_E4M3, _E8M0, _POSITIVE = "0x01 to 0x7E", "0x00 to 0xFE", "finite and above 0"


@dataclass(frozen=True, slots=True)
class Place:
    """A place as a report prints it; ``byte`` is the offset in the tensor's file."""

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
class Stored(Scale):
    """A scale as it is stored: also its offset in the file, and what is valid there."""

    byte: int
    valid: str


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its column, its code or bytes, the number that the code stands for, and its
    value.

    ``base`` is the base's value; ``code`` and ``gives`` are the nearest that can be stored under
    the stored scale.
    """

    column: int
    raw: str
    stands_for: float
    value: float
    base: float | None = None
    code: str | None = None
    gives: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted(Scale):
    """The scale that the base's block asks for under ``max`` calibration, and both root mean
    squared errors.
    """

    error: float
    stored_error: float


@dataclass(frozen=True)
class Shown:
    """What one place holds. ``format`` is the algorithm, or the dtype where nothing is quantized.

    ``asked`` are the columns that a place named exactly: one, or the two of a packed byte.
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
    scales: tuple[Stored, ...]
    scale: float | None
    elements: tuple[Element, ...]
    notes: tuple[str, ...] = ()
    base: str | None = None
    wanted: Wanted | None = None
    asked: tuple[int, ...] = ()


def parse_place(text: str) -> Place:
    """Return a place from ``NAME`` or ``NAME [row 12, block 3, byte 2,078,571, of FILE]``, as a
    report prints it.
    """
    match = _PLACE.match(text.strip())
    if match is None:
        return Place(text.strip())
    where = re.split(r"(?:^|, )(?:of|in) ", match["spots"], maxsplit=1)[
        0
    ]  # what follows is a file's name
    spots = {k: int(n.replace(",", "")) for k, n in _SPOT.findall(where)}
    return Place(match["name"], spots.get("row"), spots.get("block"), spots.get("byte"))


def show(
    uri: str | os.PathLike[str],
    place: str,
    *,
    row: int | None = None,
    block: int | None = None,
    byte: int | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Shown:
    """Return what stands at one place of a checkpoint.

    Args:
        uri: a path or an fsspec URL.
        place: a tensor, a module, or a place as the report prints it.
        row: the row of the weight, or of the scale where ``place`` names one.
        block: the block in the row.
        byte: the offset in the tensor's file, instead of both.
        base: the checkpoint whose values belong there.

    Raises:
        UsageError: no such folder.
        ContentError: no such tensor or place in it, or no checkpoint.
        MachineError: reading failed.
    """
    checkpoint, reference = (
        open_checkpoint(uri),
        open_checkpoint(base) if base is not None else None,
    )
    if (
        place.split(" ")[0] not in checkpoint.tensors
    ):  # a report speaks of the linears in a stack, not of the stack
        checkpoint, reference = (
            unstacked(checkpoint),
            unstacked(reference) if reference is not None else None,
        )
    judged = QuantizedCheckpoint(checkpoint)
    other = QuantizedCheckpoint(reference) if reference is not None else None
    tensor, found = _find(judged.checkpoint, place)
    if isinstance(checkpoint, Unstacked) and place_in_file(tensor.offset) is None:
        stack = checkpoint.stacked[tensor.name]
        raise ContentError(
            f"{tensor.name} is a part of {stack} that is no single stretch of its file; show that"
        )
    given = replace(
        found,
        row=found.row if row is None else row,
        block=found.block if block is None else block,
        byte=byte if byte is not None else (found.byte if row is None and block is None else None),
    )
    # A report counts stored elements in a row of a weight; --block counts blocks.
    elementwise = found.block is not None and block is None
    name, leaf = split(tensor.name)
    module = judged.modules[name]
    fmt = judged.format_of(module) or module.inferred_format
    of_block = (
        tensor is module.weight
        or leaf in _OF_BLOCKS
        or (leaf in SCALE_LEAVES and tensor.elements == 1)
    )
    if fmt is None or module.dims is None or not of_block or not _whole(module, fmt):
        return _plain(judged, other, module, tensor, given)
    return _block(judged, other, module, fmt, tensor, given, elementwise)


def _find(checkpoint: Checkpoint, text: str) -> tuple[Tensor, Place]:
    """Return the tensor that a text names: as it stands, as a report prints it, or as its
    module.
    """
    tensors = checkpoint.tensors
    for place in (Place(text), parse_place(text)):
        for name in (place.name, f"{place.name}.weight", f"{place.name}.weight_packed"):
            if name in tensors:
                return tensors[name], replace(place, name=name)
    place = parse_place(text)
    for name, tensor in tensors.items():
        if not name.isprintable() and printable(name) == place.name:
            return tensor, replace(place, name=name)
    patterns: dict[str, str] = {}
    for name in tensors:
        patterns.setdefault(collapse(name), name)
    near = difflib.get_close_matches(collapse(place.name), list(patterns), n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(patterns[n] for n in near)}" if near else ""
    raise ContentError(
        f"{checkpoint.uri}: no tensor {printable(place.name, 200)!r}{printable(hint, 600)}"
    )


def _whole(module: Module, fmt: Format) -> bool:
    """Whether every scale that decoding needs is there, in the dtype and shape that the format
    gives it.
    """
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
            f"byte {byte:,} is outside {tensor.name}, which has bytes {tensor.offset:,} to {last:,}"
        )
    return (byte - tensor.offset) // _itemsize(tensor)


def _itemsize(tensor: Tensor) -> int:
    return max(1, tensor.nbytes // max(1, tensor.elements))


def _require(what: str, value: int, count: int, tensor: Tensor) -> int:
    if not 0 <= value < count:
        raise ContentError(
            f"{tensor.name} {list(tensor.shape)} has no {what} {value:,}; 0 to {count - 1:,}"
        )
    return value


def _read(checkpoint: Checkpoint, tensor: Tensor, first: int, count: int) -> npt.NDArray[Any]:
    """Return ``count`` elements from the flat index ``first`` on, as raw bytes where numpy has no
    such dtype.
    """
    size = _itemsize(tensor)
    data = checkpoint.source.read(tensor.file, tensor.offset + first * size, count * size)
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    return data if dtype is None else data.view(dtype)


def _hex(value: npt.NDArray[Any]) -> str:
    """Return one little-endian element as a number in hexadecimal."""
    return f"0x{value.reshape(1).view(np.uint8)[::-1].tobytes().hex().upper()}"


# what is not quantized, or cannot be decoded


def _plain(
    judged: QuantizedCheckpoint,
    other: QuantizedCheckpoint | None,
    module: Module,
    tensor: Tensor,
    given: Place,
) -> Shown:
    flat = _flat(tensor, given)
    row_length = tensor.shape[-1] if tensor.shape else 1
    start = flat - flat % row_length
    first = start + (flat - start) // WINDOW * WINDOW
    count = max(0, min(WINDOW, start + row_length - first, tensor.elements - first))
    values = _read(judged.checkpoint, tensor, first, count)
    numbers = (
        values.astype(np.float64)
        if values.dtype != np.complex64
        else values.real.astype(np.float64)
    )
    notes = []
    if tensor.dtype not in NUMPY_DTYPES:
        notes.append(f"{tensor.dtype} is shown as bytes")
    if module.quantized and tensor is module.weight:
        notes.append(
            "the parts of this module make no format that can be decoded; `ckptgate check` says what is wrong"
        )
    theirs = _same_elements(other, tensor, first, count, notes) if other is not None else None
    elements = tuple(
        Element(
            first - start + i,
            _hex(values[i : i + 1]),
            float(numbers[i]),
            float(numbers[i]),
            None if theirs is None else float(theirs[i]),
        )
        for i in range(len(numbers))
    )
    kind = precision_of(judged, module)
    return Shown(
        judged.checkpoint.uri,
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
        asked=(flat - start,) if (given.row, given.block, given.byte) != (None, None, None) else (),
    )


def _flat(tensor: Tensor, given: Place) -> int:
    """Return the flat index of the element that is meant; row and block count as a report counts
    them.
    """
    if given.byte is not None:
        return _index(tensor, given.byte)
    rank = len(tensor.shape)
    if rank > 2 and (given.row or given.block):
        raise ContentError(f"{tensor.name} has {rank} dimensions: a row is not enough; give --byte")
    row, column = given.row or 0, given.block or 0
    if rank == 2:
        row = _require("row", row, tensor.shape[0], tensor)
        return row * tensor.shape[1] + _require("column", column, tensor.shape[1], tensor)
    if not tensor.elements:
        raise ContentError(f"{tensor.name} {list(tensor.shape)} holds no value")
    return _require("element", row or column, tensor.elements, tensor)


def _same_elements(
    other: QuantizedCheckpoint, tensor: Tensor, first: int, count: int, notes: list[str]
) -> npt.NDArray[np.float64] | None:
    theirs = other.checkpoint.tensors.get(tensor.name)
    if theirs is None:
        notes.append("the base has no such tensor")
    elif theirs.shape != tensor.shape:
        notes.append(f"the base has it as {theirs.dtype} {list(theirs.shape)}")
    elif theirs.dtype in NUMPY_DTYPES:
        found: npt.NDArray[np.float64] = _read(other.checkpoint, theirs, first, count).real.astype(
            np.float64
        )
        return found
    return None


def _siblings(module: Module) -> tuple[str, ...]:
    return tuple(
        f"{leaf or 'itself'} {t.dtype} {list(t.shape)}" for leaf, t in module.parts.items()
    )


# a block of codes


def _block(
    judged: QuantizedCheckpoint,
    other: QuantizedCheckpoint | None,
    module: Module,
    fmt: Format,
    tensor: Tensor,
    given: Place,
    elementwise: bool,
) -> Shown:
    weight, dims = module.weight, module.dims
    if weight is None or dims is None:
        raise ContentError(f"{module.name}: no weight of two dimensions")
    in_ = dims[1]
    row, column = _spot(module, fmt, tensor, given, elementwise)
    size = fmt.group_size or WINDOW
    block = column // size
    first, last = block * size, min(in_, block * size + size)
    parts = _sliced(judged.checkpoint, module, fmt, row, first, last)
    values = decode(parts, fmt.name)[0]
    units = decode(_ones(parts, fmt), fmt.name)[0] if values.size else values
    codes = _codes(parts, fmt)
    stands = (
        ml_dtypes.float4_e2m1fn if fmt.packed else ml_dtypes.float8_e4m3fn,
        "0x{:X}" if fmt.packed else "0x{:02X}",
    )
    numbers = codes.view(stands[0]).astype(np.float64)
    notes: list[str] = []
    base_values = (
        _base_values(other, module, dims, row, first, last, notes) if other is not None else None
    )
    finite = base_values is not None and np.isfinite(base_values).all()
    if base_values is not None and not finite:
        notes.append("the base is not finite here")
    best, best_codes, wanted = None, None, None
    if base_values is not None and finite:
        wanted = _wanted(base_values, values, parts, fmt)
        if np.isfinite(units).all():
            best, best_codes = _nearest(base_values, parts, units, fmt)
    elements = tuple(
        Element(
            first + i,
            stands[1].format(int(codes[i])),
            float(numbers[i]),
            float(values[i]),
            None if base_values is None else float(base_values[i]),
            None if best_codes is None else stands[1].format(int(best_codes[i])),
            None if best is None else float(best[i]),
        )
        for i in range(min(MOST, last - first))
    )
    if last - first > MOST:
        notes.append(f"the first {MOST} of {last - first} columns of the block are shown")
    if fmt.block is None:
        notes.append(f"{fmt.algo} has no blocks along a row: a window of {WINDOW} columns is shown")
    exact = tensor is weight and (given.byte is not None or elementwise)
    byte = (
        weight.offset
        + row * weight.shape[1] * _itemsize(weight)
        + first // (2 if fmt.packed else 1)
    )
    return Shown(
        judged.checkpoint.uri,
        tensor,
        module.name,
        role(module.name),
        fmt.algo,
        _siblings(module),
        row,
        None if fmt.block is None else block,
        byte,
        first,
        in_,
        _stored(judged.checkpoint, module, fmt, row, block),
        float(units[0]),
        elements,
        tuple(notes),
        other.checkpoint.uri if other else None,
        wanted,
        tuple(range(column, column + (2 if fmt.packed else 1))) if exact else (),
    )


def _spot(
    module: Module, fmt: Format, tensor: Tensor, given: Place, elementwise: bool
) -> tuple[int, int]:
    """Return row and column of the weight, in elements, that a place of the weight or of one of its
    scales means.
    """
    out, in_ = module.dims or (0, 0)
    height, width = fmt.block or (1, WINDOW)
    if tensor is module.weight:
        if given.byte is not None:
            flat = _index(tensor, given.byte)
            row, column = flat // tensor.shape[1], flat % tensor.shape[1] * (2 if fmt.packed else 1)
        else:
            step = (2 if fmt.packed else 1) if elementwise else width
            row, column = given.row or 0, (given.block or 0) * step
    else:
        grid = (-(-out // height), -(-in_ // width) if fmt.block else 1)
        if given.byte is not None:
            flat = _index(tensor, given.byte)
            row, block = divmod(flat, grid[1]) if tensor.elements == grid[0] * grid[1] else (0, 0)
        else:
            row, block = given.row or 0, given.block or 0
        row, column = row * height, block * width
    _require("row", row, out, module.weight or tensor)
    if not 0 <= column < in_:
        raise ContentError(
            f"{module.name} has no block {column // width:,}; 0 to {-(-in_ // width) - 1:,}"
        )
    return row, column


def _sliced(
    checkpoint: Checkpoint, module: Module, fmt: Format, row: int, first: int, last: int
) -> Parts:
    """Return the parts of one block as `decode` takes them: one row, and the scales that reach
    it.
    """
    weight, pack = module.weight, 2 if fmt.packed else 1
    if weight is None:
        raise ContentError(f"{module.name}: no weight")
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
    """Return the code of each element of a block, one a byte."""
    raw = parts["weight"][0].view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=1).reshape(-1) if fmt.packed else raw


def _ones(parts: Parts, fmt: Format) -> Parts:
    """Return the parts with the code of 1.0 everywhere: they decode to the whole scale."""
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
    dtype = ml_dtypes.float4_e2m1fn if fmt.packed else ml_dtypes.float8_e4m3fn
    codes: npt.NDArray[np.uint8] = numbers.astype(dtype).view(np.uint8)
    return best, codes & np.uint8(15 if fmt.packed else 255)


def _base_values(
    other: QuantizedCheckpoint,
    module: Module,
    dims: tuple[int, int],
    row: int,
    first: int,
    last: int,
    notes: list[str],
) -> Float32 | None:
    """Return the base's values at the same row and columns, decoded where it is itself
    quantized.
    """
    theirs = other.modules.get(module.name)
    if theirs is None or theirs.weight is None:
        notes.append("the base has no such module")
        return None
    if theirs.dims != dims:
        notes.append(f"the base has it as {theirs.weight.dtype} {list(theirs.weight.shape)}")
        return None
    if not theirs.quantized and theirs.weight.dtype in FLOATS:
        return _read(other.checkpoint, theirs.weight, row * dims[1] + first, last - first).astype(
            np.float32
        )
    values = other.values(theirs)
    if values is None:
        notes.append("the base's values cannot be decoded")
        return None
    return values[row, first:last]


def _wanted(base: Float32, values: Float32, parts: Parts, fmt: Format) -> Wanted | None:
    """Return the block scale that the base asks for, where the format has one a block of a row."""
    leaf = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
    if fmt.name == "mxfp8":
        found = max_scales(base[None], "mxfp8")
        if found is None:
            return None
        code = found["weight_scale"].view(np.uint8)
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
    return Wanted(leaf, _hex(code), value, _rms(best, base), _rms(values, base))


def _rms(a: Float32, b: Float32) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


def _stored(
    checkpoint: Checkpoint, module: Module, fmt: Format, row: int, block: int
) -> tuple[Stored, ...]:
    """Return the scales that reach a block."""
    found = []
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
        found.append(
            Stored(leaf, _hex(raw), number, tensor.offset + flat * _itemsize(tensor), valid)
        )
    return tuple(found)
