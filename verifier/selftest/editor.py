# SPDX-License-Identifier: Apache-2.0
"""A small editor for a checkpoint directory: one tensor, one byte, one JSON file at a time.

It reads and writes safetensors by hand, so that an edit changes exactly what was asked for. The
index follows every edit of a shard unless the caller says otherwise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.findings import Where

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANT_CONFIG = "hf_quant_config.json"
DTYPES: Mapping[str, npt.DTypeLike] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "I32": np.int32,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
LEAVES = ("weight", "bias", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale")
Header = dict[str, dict[str, Any]]
Edit = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its shard stores it; ``offset`` is absolute in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return self.nbytes // max(1, math.prod(self.shape))

    @property
    def unpacked(self) -> tuple[int, int]:
        """Rows and columns of a 2-D weight; a U8 weight packs two values per byte."""
        rows, columns = self.shape
        return rows, columns * 2 if self.dtype == "U8" else columns


@dataclass(slots=True)
class RawShard:
    """One safetensors file in memory: its metadata, and dtype, shape and bytes of each tensor."""

    metadata: dict[str, str] = field(default_factory=dict)
    entries: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)


def read_header(path: Path) -> tuple[Header, int]:
    """Return the header of a safetensors file without its metadata, and the offset at which the
    data begins.
    """
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header: Header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_shard(path: Path) -> RawShard:
    """Return a safetensors file in memory, tensors in the order of their bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    shard = RawShard(header.pop("__metadata__", {}))
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, end = entry["data_offsets"]
        data = raw[8 + length + start : 8 + length + end]
        shard.entries[name] = (entry["dtype"], tuple(entry["shape"]), data)
    return shard


def write_shard(path: Path, shard: RawShard) -> None:
    """Write a safetensors file: the header padded to eight bytes, the tensors in the order of
    ``entries``.
    """
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    offset = 0
    for name, (dtype, shape, data) in shard.entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        len(text).to_bytes(8, "little")
        + text
        + b"".join(data for _, _, data in shard.entries.values())
    )


def split(name: str) -> tuple[str, str]:
    """Return module and leaf of a tensor name; a bare parameter has the leaf ''."""
    head, _, leaf = name.rpartition(".")
    return (head, leaf) if leaf in LEAVES and head else (name, "")


class CheckpointEditor:
    """A checkpoint directory; every method reads from disk and writes through to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def shards(self) -> list[str]:
        """The names of the safetensors files, sorted."""
        return sorted(f.name for f in self.path.glob("*.safetensors"))

    @property
    def has_index(self) -> bool:
        """Whether the directory has an index."""
        return (self.path / INDEX).is_file()

    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor by name, by file and then in the order of the header."""
        tensors: dict[str, StoredTensor] = {}
        for file in self.shards:
            header, start = read_header(self.path / file)
            for name, entry in header.items():
                low, high = entry["data_offsets"]
                tensors[name] = StoredTensor(
                    name, entry["dtype"], tuple(entry["shape"]), file, start + low, high - low
                )
        return tensors

    def modules(self) -> dict[str, dict[str, StoredTensor]]:
        """Return the tensors of each module by leaf, modules in the order of their first tensor."""
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors().items():
            module, leaf = split(name)
            modules.setdefault(module, {})[leaf] = tensor
        return modules

    def siblings(self, module: str) -> list[str]:
        """Return the full names of all tensors of a module."""
        return [t.name for t in self.modules()[module].values()]

    def read(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        tensor = self.tensors()[name]
        with (self.path / tensor.file).open("rb") as handle:
            handle.seek(tensor.offset)
            return handle.read(tensor.nbytes)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a writable array of its dtype and shape."""
        tensor = self.tensors()[name]
        return np.frombuffer(self.read(name), DTYPES[tensor.dtype]).reshape(tensor.shape).copy()

    def where(self, name: str, element: int | None = None, byte: int = 0) -> Where:
        """Return the location of a tensor, or of byte ``byte`` of one of its elements."""
        tensor = self.tensors()[name]
        if element is None:
            return Where(name, tensor.file)
        row: int | None = None
        block: int | None = None
        if len(tensor.shape) == 1:
            row = element
        elif tensor.shape:
            index = np.unravel_index(element, tensor.shape)
            row, block = int(index[-2]), int(index[-1])
        return Where(
            name, tensor.file, row, block, tensor.offset + element * tensor.itemsize + byte
        )

    def overwrite(self, name: str, element: int, data: bytes) -> Where:
        """Overwrite bytes of a tensor in place, from an element on; nothing else of the file
        changes.
        """
        tensor = self.tensors()[name]
        start = element * tensor.itemsize
        if start < 0 or start + len(data) > tensor.nbytes:
            raise ValueError(f"{name}: bytes {start} to {start + len(data)} of {tensor.nbytes}")
        with (self.path / tensor.file).open("r+b") as handle:
            handle.seek(tensor.offset + start)
            handle.write(data)
        return self.where(name, element)

    def replace(
        self, name: str, dtype: str, shape: tuple[int, ...], data: bytes, *, index: bool = True
    ) -> Where:
        """Replace dtype, shape and bytes of a tensor, at the same position in its shard."""
        file = self.tensors()[name].file
        shard = read_shard(self.path / file)
        shard.entries[name] = (dtype, shape, data)
        write_shard(self.path / file, shard)
        self._update_index(index)
        return self.where(name)

    def store(self, name: str, values: npt.NDArray[Any], *, index: bool = True) -> Where:
        """Replace a tensor by an array: its dtype, shape and bytes."""
        dtype = next(k for k, v in DTYPES.items() if np.dtype(v) == values.dtype)
        return self.replace(
            name, dtype, values.shape, np.ascontiguousarray(values).tobytes(), index=index
        )

    def drop(self, names: Iterable[str], *, index: bool = True) -> None:
        """Remove tensors from their shards."""
        dropped = set(names)
        for file in self._files_of(dropped):
            shard = read_shard(self.path / file)
            shard.entries = {n: e for n, e in shard.entries.items() if n not in dropped}
            write_shard(self.path / file, shard)
        self._update_index(index, dropped)

    def rename(self, names: Mapping[str, str], *, index: bool = True) -> None:
        """Rename tensors; their order stays."""
        for file in self._files_of(set(names)):
            shard = read_shard(self.path / file)
            shard.entries = {names.get(n, n): e for n, e in shard.entries.items()}
            write_shard(self.path / file, shard)
        self._update_index(index, set(names) - set(names.values()))

    def rename_module(self, module: str, new: str, *, index: bool = True) -> None:
        """Rename a module with all its siblings."""
        self.rename({n: new + n[len(module) :] for n in self.siblings(module)}, index=index)

    def add(
        self, name: str, values: npt.NDArray[Any], *, file: str | None = None, index: bool = True
    ) -> Where:
        """Append a tensor to a shard, by default the first; a missing shard is created."""
        target = file or self.shards[0]
        path = self.path / target
        shard = read_shard(path) if path.exists() else RawShard({"format": "pt"})
        dtype = next(k for k, v in DTYPES.items() if np.dtype(v) == values.dtype)
        shard.entries[name] = (dtype, values.shape, np.ascontiguousarray(values).tobytes())
        write_shard(path, shard)
        self._update_index(index)
        return Where(name, target)

    def edit_json(self, file: str, change: Edit) -> None:
        """Change the object of a JSON file."""
        value = json.loads((self.path / file).read_text())
        change(value)
        (self.path / file).write_text(json.dumps(value, indent=2) + "\n")

    def json(self, file: str) -> dict[str, Any]:
        """Return the object of a JSON file."""
        value: dict[str, Any] = json.loads((self.path / file).read_text())
        return value

    def remove(self, file: str) -> None:
        """Delete a file."""
        os.unlink(self.path / file)

    def _files_of(self, names: set[str]) -> list[str]:
        tensors = self.tensors()
        missing = names - tensors.keys()
        if missing:
            raise KeyError(f"no tensor {min(missing)!r} in {self.path}")
        return sorted({tensors[n].file for n in names})

    def _update_index(self, index: bool, dropped: Iterable[str] = ()) -> None:
        """Update names, shards and total_size in the index; remove the entries of ``dropped``."""
        if not index or not self.has_index:
            return
        tensors = self.tensors()
        removed = set(dropped)

        def change(value: dict[str, Any]) -> None:
            entries = {n: f for n, f in value["weight_map"].items() if n not in removed}
            value["weight_map"] = entries | {n: t.file for n, t in tensors.items()}
            if "total_size" in value.get("metadata", {}):
                value["metadata"]["total_size"] = sum(t.nbytes for t in tensors.values())

        self.edit_json(INDEX, change)
