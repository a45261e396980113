# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder in memory, to be edited and written out again; numpy and JSON, nothing of the
judge.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
INDEX, CONFIG, NESTED = "model.safetensors.index.json", "config.json", "hf_quant_config.json"
DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I32": np.int32,
    "I64": np.int64,
}
NAME_OF = {np.dtype(v): k for k, v in DTYPES.items()}
LEAVES = (
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "input_scale",
    "k_scale",
    "v_scale",
)
EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.([^.]+)$")
FLOATS = ("BF16", "F16", "F32")


class Unfit(Exception):
    """The edit does not fit this checkpoint."""


@dataclass
class Tensor:
    """One tensor: dtype as the header spells it, shape, bytes, and the shard that holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    file: str

    def array(self) -> Array:
        """Return a writable copy in its dtype and shape."""
        return np.frombuffer(self.data, DTYPES[self.dtype]).reshape(self.shape).copy()

    def raw(self) -> Array:
        """Return a writable copy of its bytes, [..., itemsize] folded into the last axis."""
        return np.frombuffer(self.data, np.uint8).copy()


@dataclass
class Image:
    """A checkpoint: tensors in order, JSON files, and what is done after writing.

    The index is made anew from the tensors when it is written; ``on_index`` then edits it, ``post``
    edits the files.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, dict[str, str]]
    json: dict[str, Any]
    other: dict[str, bytes]
    indexed: bool
    on_index: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    post: list[Callable[[Path], None]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Image:
        """Return a copy whose edits leave this one alone."""
        return Image(
            {n: Tensor(t.dtype, t.shape, t.data, t.file) for n, t in self.tensors.items()},
            copy.deepcopy(self.metadata),
            copy.deepcopy(self.json),
            dict(self.other),
            self.indexed,
        )

    @property
    def files(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted({t.file for t in self.tensors.values()})

    def modules(self) -> dict[str, list[str]]:
        """Return the leaves of each module, in order."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            module, leaf = split(name)
            found.setdefault(module, []).append(leaf)
        return found

    def scale_leaf(self, module: str) -> str:
        """Return the leaf of a module's weight scale."""
        for leaf in ("weight_scale", "weight_scale_inv"):
            if f"{module}.{leaf}" in self.tensors:
                return leaf
        raise Unfit(module)

    def quantized(self) -> list[str]:
        """Return the modules with a weight and a weight scale."""
        return [
            m
            for m, p in self.modules().items()
            if "weight" in p and {"weight_scale", "weight_scale_inv"} & set(p)
        ]

    def plain(self, rank: int | None = None) -> list[str]:
        """Return the unquantized float tensors that are not scales, of one rank or of all."""
        quantized = set(self.quantized())
        return [
            n
            for n, t in self.tensors.items()
            if t.dtype in FLOATS
            and not n.endswith(("_scale", "_scale_2", "_scale_inv"))
            and (split(n)[0] not in quantized)
            and rank in (None, len(t.shape))
        ]

    def put(self, name: str, values: Array, file: str | None = None) -> None:
        """Store an array under a name, in the shard that held it or the first."""
        old = self.tensors.get(name)
        home = file or (old.file if old else self.files[0])
        self.tensors[name] = Tensor(
            NAME_OF[values.dtype], values.shape, np.ascontiguousarray(values).tobytes(), home
        )

    def drop(self, names: list[str]) -> None:
        """Remove tensors."""
        for name in names:
            del self.tensors[name]

    def rename(self, names: dict[str, str]) -> None:
        """Rename tensors in place."""
        self.tensors = {names.get(n, n): t for n, t in self.tensors.items()}

    def of_module(self, module: str) -> list[str]:
        """Return the full names of a module's tensors."""
        return [n for n in self.tensors if split(n)[0] == module]

    def swap(self, one: str, other: str, leaves: list[str] | None = None) -> None:
        """Swap two modules, in some leaves or in all; shapes and dtypes must agree."""
        mine = {split(n)[1] for n in self.of_module(one)}
        if mine != {split(n)[1] for n in self.of_module(other)}:
            raise Unfit("not the same leaves")
        for leaf in sorted(mine) if leaves is None else leaves:
            a, b = self.tensors[f"{one}.{leaf}"], self.tensors[f"{other}.{leaf}"]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                raise Unfit("not the same shape")
            a.data, b.data = b.data, a.data

    def declared(self) -> list[dict[str, Any]]:
        """Return the quantization declarations, each the dict that holds algorithm and
        exclusions.
        """
        found = []
        if isinstance(self.json.get(CONFIG, {}).get("quantization_config"), dict):
            found.append(self.json[CONFIG]["quantization_config"])
        if NESTED in self.json:
            found.append(self.json[NESTED]["quantization"])
        return found

    def write(self, path: Path) -> Path:
        """Write the directory, which must not exist."""
        path.mkdir(parents=True)
        for file in self.files:
            pad = self.layout.get("pad", {}).get(file)
            held = {n: t for n, t in self.tensors.items() if t.file == file}
            order = self.layout.get("order", {}).get(file)
            keys = self.layout.get("keys", {}).get(file)
            (path / file).write_bytes(_shard(held, self.metadata.get(file, {}), order, keys, pad))
        values = dict(self.json)
        if self.indexed:
            index: dict[str, Any] = {
                "metadata": {"total_size": sum(len(t.data) for t in self.tensors.values())},
                "weight_map": {n: t.file for n, t in sorted(self.tensors.items())},
            }
            for edit in self.on_index:
                edit(index)
            values[INDEX] = index
        dump = self.layout.get("dump", lambda value: json.dumps(value, indent=2))
        for name, value in values.items():
            (path / name).write_text(dump(value))
        for name, data in self.other.items():
            (path / name).write_bytes(data)
        for act in self.post:
            act(path)
        return path


def split(name: str) -> tuple[str, str]:
    """Return module and leaf of a tensor name; a bare parameter has the leaf ''."""
    head, _, leaf = name.rpartition(".")
    return (head, leaf) if leaf in LEAVES and head else (name, "")


def _shard(
    held: dict[str, Tensor],
    metadata: dict[str, str],
    order: list[str] | None,
    keys: list[str] | None,
    pad: int | None,
) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    data = []
    for name in order or held:
        tensor = held[name]
        end = offset + len(tensor.data)
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        data.append(tensor.data)
        offset = end
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    header |= {n: entries[n] for n in keys or entries}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if pad is None else pad)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def read(path: Path) -> Image:
    """Return a checkpoint directory as an image."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    values: dict[str, Any] = {}
    other: dict[str, bytes] = {}
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        if file.suffix == ".safetensors":
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            metadata[file.name] = header.pop("__metadata__", {})
            for name, entry in sorted(header.items(), key=lambda e: tuple(e[1]["data_offsets"])):
                low, high = (8 + length + o for o in entry["data_offsets"])
                tensors[name] = Tensor(
                    entry["dtype"], tuple(entry["shape"]), raw[low:high], file.name
                )
        elif file.name in (CONFIG, NESTED):
            values[file.name] = json.loads(raw)
        elif file.name != INDEX:
            other[file.name] = raw
    return Image(tensors, metadata, values, other, (path / INDEX).is_file())
