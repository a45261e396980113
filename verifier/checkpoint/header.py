# SPDX-License-Identifier: Apache-2.0
"""The safetensors header, read as hostile input.

Format: 8 bytes little-endian header length N (at most 100,000,000), N bytes of JSON, then the
tensor bytes, covered without gap or overlap (https://github.com/huggingface/safetensors, "Format").
Each defect becomes a `Problem`, a value, so that one broken shard does not hide the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from verifier.checkpoint.source import Source
from verifier.errors import ContainerError
from verifier.text import json_type

MAX_HEADER = 100_000_000
MAX_RANK = 16
MAX_ELEMENTS = 2**56
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class Tensor(NamedTuple):
    """One tensor of a shard: ``offset`` is absolute in the file, ``nbytes`` its length in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of values as the header counts them (two packed nibbles are one U8)."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Problem:
    """A defect of a file; ``kind`` is a stable name, ``message`` is for people."""

    kind: str
    file: str
    message: str
    tensor: str | None = None
    observed: str = ""
    expected: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """The header of one ``*.safetensors`` file; ``header`` is the length of its JSON in bytes,
    padding included.
    """

    file: str
    size: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    header: int = 0


class _DuplicateKey(ValueError):
    """A JSON object names a key twice."""


def strict_json(text: bytes | str, *, constants: bool = False) -> Any:
    """Parse JSON; reject duplicate keys, encodings other than UTF-8, and nesting beyond the
    interpreter's limit.

    Args:
        text: the document; bytes are UTF-8 without a byte order mark.
        constants: accept Infinity, which some released configs contain; a header must not.

    Raises:
        ValueError: with the problem in one sentence.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [k for k, _ in items]
            raise _DuplicateKey(
                f"the key {next(k for i, k in enumerate(keys) if k in keys[:i])!r} occurs twice"
            )
        return result

    def constant(name: str) -> float:
        if not constants or name == "NaN":
            raise ValueError(f"{name} is not JSON")
        return float(name.replace("Infinity", "inf"))

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_constant=constant)
        if _pairs(value, decoded.count(":")):
            return value
        return json.loads(decoded, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _pairs(value: Any, colons: int) -> bool:
    """Whether a parsed document holds as many pairs as its text has colons.

    Each pair has one colon, so if the numbers are equal, no key was repeated. The reverse does not
    hold: strings contain colons too.
    """
    count, level = 0, [value]
    while level:
        objects = [v for v in level if type(v) is dict]
        count += sum(map(len, objects))
        if count >= colons:
            break
        arrays = [v for v in level if type(v) is list]
        level = [*chain.from_iterable(v.values() for v in objects), *chain.from_iterable(arrays)]
    return count == colons


def header_length(source: Source, file: str, size: int) -> int:
    """Return the length of a header in bytes where the file can hold it, else 0."""
    if size < 8:
        return 0
    length = int.from_bytes(source.read(file, 0, 8).tobytes(), "little")
    return length if length <= MAX_HEADER and 8 + length <= size else 0


_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_MAX = 1024  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, "The Pointer"


def is_lfs_pointer(source: Source, file: str, size: int) -> bool:
    """Whether a file is a Git LFS pointer, the stand-in for a file that was not downloaded."""
    return len(_LFS) <= size < _LFS_MAX and source.read(file, 0, len(_LFS)).tobytes() == _LFS


def read_shard(source: Source, file: str, size: int) -> Shard:
    """Return the parsed header of ``file``; never raises for the file's contents."""
    if size < 8:
        return _broken(file, size, "short", f"{size} bytes, shorter than the 8-byte header length")
    length = int.from_bytes(source.read(file, 0, 8).tobytes(), "little")
    if length > MAX_HEADER:
        if is_lfs_pointer(source, file, size):
            message = "is a Git LFS pointer, not tensors; `git lfs pull` downloads them"
            return _broken(file, size, "header-length", message)
        reason = (
            "the file is all zeros or not safetensors"
            if length > size
            else "the header is too large"
        )
        return _broken(
            file, size, "header-length", f"declares a header of {length:,} bytes; {reason}"
        )
    if 8 + length > size:
        return _broken(
            file,
            size,
            "truncated",
            f"ends inside its header: {8 + length - size:,} bytes are missing",
        )
    if length == 0:
        return _broken(
            file,
            size,
            "header-length",
            "declares a header of 0 bytes; a file of zeros is not safetensors",
        )
    raw = source.read(file, 8, length).tobytes()
    try:
        entries = strict_json(raw)
    except _DuplicateKey as error:
        return _broken(file, size, "duplicate", f"the header is ambiguous: {error}")
    except ValueError as error:
        return _broken(file, size, "json", f"the header is not JSON: {error}")
    if not isinstance(entries, dict):
        return _broken(file, size, "json", "the header is not a JSON object")
    return _from_entries(file, size, 8 + length, entries)


def _broken(file: str, size: int, kind: str, message: str) -> Shard:
    return Shard(file, size, {}, {}, (Problem(kind, file, message),))


def _from_entries(file: str, size: int, start: int, entries: dict[str, Any]) -> Shard:
    problems: list[Problem] = []

    def note(
        kind: str, message: str, tensor: str | None = None, observed: str = "", expected: str = ""
    ) -> None:
        problems.append(Problem(kind, file, message, tensor, observed, expected))

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        note("metadata", "__metadata__ is not an object of strings")
        metadata = {}
    for name in _not_text(entries):
        note(
            "name",
            "the name is not valid Unicode (a lone surrogate); safetensors rejects the file",
            name,
        )
    tensors = _contiguous(file, start, entries)
    if (
        tensors is not None
        and not problems
        and start + sum(t.nbytes for t in tensors.values()) == size
    ):
        return Shard(file, size, tensors, metadata, header=start - 8)
    if tensors is None:
        tensors = {}
        for name, entry in entries.items():
            tensor = _tensor(file, start, name, entry, note)
            if tensor is not None:
                tensors[name] = tensor
    # An entry that could not be read may well be what fills a gap.
    whole = not problems or all(p.kind in ("metadata", "name") for p in problems)
    end = start
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset < end:
            note("overlap", f"overlaps the tensor before it by {end - t.offset:,} bytes", t.name)
        elif t.offset > end and whole:
            note("gap", f"{t.offset - end:,} bytes before it belong to no tensor", t.name)
        end = max(end, t.offset + t.nbytes)
    if end > size:
        cut_off = [t.name for t in tensors.values() if t.offset + t.nbytes > size]
        note(
            "truncated",
            f"ends {end - size:,} bytes early; "
            f"{len(cut_off)} of {len(tensors)} tensors are cut off",
            cut_off[0],
            f"{size:,} bytes",
            f"{end:,} bytes",
        )
        for name in cut_off:
            del tensors[name]
    elif end < size and whole:
        note(
            "trailing",
            f"{size - end:,} bytes after the last tensor",
            None,
            f"{size:,} bytes",
            f"{end:,} bytes",
        )
    return Shard(file, size, tensors, metadata, tuple(problems), start - 8)


def _contiguous(file: str, start: int, entries: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors of a header in which every entry is valid and begins where the previous
    one ended, else None.

    A header of 100,000 tensors has a dozen shapes: each is validated once. `_tensor` validates the
    entries of other headers one by one.
    """
    try:
        columns = [
            (e["dtype"], e["shape"], *e["data_offsets"]) for e in entries.values() if len(e) == 3
        ]
        dtypes, shapes, begins, ends = zip(*columns, strict=True)
        numbers = set(map(type, chain(begins, ends, chain.from_iterable(shapes))))
        kinds = {*map(type, dtypes)}, {*map(type, shapes)}, numbers
        if len(columns) != len(entries) or kinds != ({str}, {list}, {int}):
            return None
    except (KeyError, TypeError, ValueError):
        return None
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}
    position = 0
    for name, (dtype, dims, begin, end) in zip(entries, columns, strict=True):
        key = dtype, tuple(dims)
        known = seen.get(key)
        if known is None:
            nbytes = _nbytes(*key)
            if nbytes is None:
                return None
            known = seen[key] = (*key, nbytes)
        if begin != position or end - begin != known[2]:
            return None
        tensors[name] = Tensor(name, known[0], known[1], file, start + begin, known[2])
        position = end
    return tensors if position <= 2**62 else None


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    if (
        dtype not in DTYPE_BITS
        or not _naturals(list(shape))
        or len(shape) > MAX_RANK
        or math.prod(shape) > MAX_ELEMENTS
    ):
        return None
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    return None if bits % 8 else bits // 8


def _not_text(names: Iterable[str]) -> list[str]:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return [n for n in names if any("\ud800" <= c <= "\udfff" for c in n)]
    return []


def _tensor(
    file: str, start: int, name: str, entry: Any, note: Callable[..., None]
) -> Tensor | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        note("entry", "its header entry is not {dtype, shape, data_offsets}", name)
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        note("dtype", f"has the unknown dtype {str(dtype)[:40]!r}", name)
        return None
    if not _naturals(shape) or len(shape) > MAX_RANK or math.prod(shape) > MAX_ELEMENTS:
        note("shape", f"has the impossible shape {str(shape)[:60]}", name)
        return None
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > 2**62:
        note("offsets", f"has the impossible data_offsets {str(offsets)[:60]}", name)
        return None
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    length, needed = offsets[1] - offsets[0], -(-bits // 8)
    if bits % 8 or length != needed:
        note(
            "offsets",
            f"takes {length:,} bytes where {dtype} {list(shape)} takes {needed:,}",
            name,
            f"{length:,} bytes",
            f"{needed:,} bytes",
        )
        return None
    return Tensor(name, dtype, tuple(shape), file, start + offsets[0], length)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def read_json(
    source: Source, file: str, size: int, limit: int = MAX_HEADER
) -> tuple[Any, Problem | None]:
    """Return the parsed file and its defect; one of both is None."""
    if size > limit:
        return None, Problem("json", file, f"{size:,} bytes, more than the {limit:,} allowed")
    try:
        value = strict_json(source.read(file, 0, size).tobytes(), constants=True)
    except ContainerError as error:
        return None, Problem("json", file, str(error))
    except ValueError as error:
        return None, Problem("json", file, f"not JSON: {error}")
    if not isinstance(value, dict):
        return None, Problem("json", file, f"{json_type(value)}, expected an object")
    return value, None
