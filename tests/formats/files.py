# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in memory, and its files; a writer of safetensors of its own."""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
DTYPE_NAMES = {
    BF16: "BF16",
    E4M3: "F8_E4M3",
    E8M0: "F8_E8M0",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int64): "I64",
}


@dataclass
class Checkpoint:
    """Tensors by name, JSON files by name, and what the shard's ``__metadata__`` says."""

    tensors: Tensors
    json: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        value: dict[str, Any] = self.json["config.json"]
        return value

    def copy(self) -> Checkpoint:
        """Return a copy; its arrays are replaced by edits, never written into."""
        return Checkpoint(dict(self.tensors), copy.deepcopy(self.json), dict(self.metadata))

    def write(self, folder: Path) -> Path:
        """Write the files into a new folder and return it."""
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(safetensors(self.tensors, self.metadata))
        for name, value in self.json.items():
            (folder / name).write_text(json.dumps(value, indent=1))
        (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
        return folder


def safetensors(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """Return a safetensors file: the header's length in 8 bytes, the header, the bytes of all."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data, end = [], 0
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + len(raw)],
        }
        data.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)
