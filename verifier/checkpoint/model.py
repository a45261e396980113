# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as its headers, index and configs declare it; immutable, and lazy about bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.checkpoint.header import (
    Problem,
    Shard,
    Tensor,
    header_length,
    read_json,
    read_shard,
)
from verifier.checkpoint.index import FIRST_GUESS, INDEX, Index, header_guesses, read_index
from verifier.checkpoint.kinds import require_checkpoint
from verifier.checkpoint.opening import open_source
from verifier.checkpoint.source import Bytes, Source
from verifier.errors import ContainerError, MachineError

CONFIGS = ("config.json", "hf_quant_config.json")
NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Checkpoint:
    """All shards of a directory, its index and its two configs.

    ``tensors`` holds each name once (the indexed copy where the index names one, else the first);
    names that several files hold are in ``duplicates``.
    """

    uri: str
    source: Source
    files: Mapping[str, int]
    shards: tuple[Shard, ...]
    index: Index | None
    config: Mapping[str, Any] | None
    hf_quant_config: Mapping[str, Any] | None
    problems: tuple[Problem, ...]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in file order."""
        tensors: dict[str, Tensor] = {}
        weight_map = self.index.weight_map if self.index else {}
        for shard in self.shards:
            again = shard.tensors.keys() & tensors.keys()
            known = {name for name in again if weight_map.get(name) != shard.file}
            tensors |= (
                {name: t for name, t in shard.tensors.items() if name not in known}
                if known
                else shard.tensors
            )
        return MappingProxyType(tensors)

    @cached_property
    def duplicates(self) -> Mapping[str, tuple[str, ...]]:
        """Names that more than one file holds, with those files."""
        if len(self.tensors) == sum(len(s.tensors) for s in self.shards):
            return {}
        files: dict[str, list[str]] = {}
        for shard in self.shards:
            for name in shard.tensors:
                files.setdefault(name, []).append(shard.file)
        return {name: tuple(f) for name, f in files.items() if len(f) > 1}

    def versions(self) -> dict[str, tuple[str | int, ...]]:
        """Return for each shard what changes when it is rewritten, as far as the source knows.

        Raises:
            MachineError: a shard cannot be read any more.
        """
        return {shard.file: self._version(shard.file) for shard in self.shards}

    def _version(self, file: str) -> tuple[str | int, ...]:
        try:
            return self.source.version(file)
        except OSError as error:
            raise MachineError(
                f"{self.uri}/{file}: {error.strerror or error}; it was there before"
            ) from error

    def require_unchanged(self, versions: Mapping[str, tuple[str | int, ...]]) -> None:
        """Refuse what was read of shards that were rewritten meanwhile.

        Args:
            versions: the result of `versions` before the first read.

        Raises:
            MachineError: naming the first shard that changed.
        """
        for file, version in self.versions().items():
            if version != versions[file]:
                raise MachineError(
                    f"{self.uri}/{file}: changed while it was read; run the same command again"
                )

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 over name, dtype, shape and bytes of every tensor, whatever the sharding.

        The first use reads every byte.
        """
        state = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            state.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            state.update(self.read(tensor).data)
        return state.hexdigest()

    @property
    def model_type(self) -> str | None:
        """The ``model_type`` of config.json, or None."""
        value = (self.config or {}).get("model_type")
        return value if isinstance(value, str) else None

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors.values())

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Announce reads of whole tensors, in their order; a remote source fetches them ahead."""
        if self.source.remote:
            self.source.expect((t.file, t.offset, t.nbytes) for t in tensors)

    def read(self, tensor: Tensor) -> Bytes:
        """Return the bytes of a tensor, uint8, one dimension."""
        return self.source.read(tensor.file, tensor.offset, tensor.nbytes)

    def read_range(self, tensor: Tensor, start: int, length: int) -> Bytes:
        """Return ``length`` bytes of a tensor from its byte ``start``, uint8, one dimension."""
        return self.source.read(tensor.file, tensor.offset + start, length)

    def pieces(self, tensor: Tensor, size: int = 1 << 20) -> Iterator[tuple[int, Bytes]]:
        """Yield (start, bytes) of consecutive pieces of a tensor, each of ``size`` bytes but the
        last.

        Each overwrites the one before it: a copy outlives the loop, a view does not.
        """
        buffer = np.empty(min(size, tensor.nbytes), np.uint8)
        for start in range(0, tensor.nbytes, size):
            piece = buffer[: min(size, tensor.nbytes - start)]
            self.source.read_into(tensor.file, tensor.offset + start, piece)
            yield start, piece

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor in its own dtype and shape.

        Raises:
            ContainerError: numpy has no such dtype.
        """
        dtype = NUMPY_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise ContainerError(f"{tensor.name}: values of dtype {tensor.dtype} cannot be read")
        return self.read(tensor).view(dtype).reshape(tensor.shape)


def open_checkpoint(uri: str | os.PathLike[str]) -> Checkpoint:
    """Read headers, index and configs of a checkpoint; one of 250 GB costs some megabytes.

    Args:
        uri: a directory, or an address of a hub repository, web directory or object store
            (`verifier.checkpoint.address`).

    Raises:
        UsageError: no such directory or repository, or no access to it.
        MissingExtra: the address needs an extra that is not installed.
        NotACheckpointError: the directory holds no safetensors checkpoint; it is a UsageError.
        MachineError: reading failed.
    """
    source = open_source(uri)
    files = source.files()
    require_checkpoint(source, files)
    names = sorted(n for n in files if n.endswith(".safetensors"))
    problems = [
        Problem("link", n, "the link leads out of the directory and is not followed")
        for n in source.escaping
    ]
    source.expect((n, 0, files[n]) for n in (INDEX, *CONFIGS) if n in files)
    index = read_index(source, files) if INDEX in files else None
    if source.remote:
        _expect_headers(source, names, files, index)
    shards = tuple(read_shard(source, n, files[n]) for n in names)
    configs: dict[str, Mapping[str, Any] | None] = {}
    for name in CONFIGS:
        configs[name] = None
        if name in files:
            configs[name], problem = read_json(source, name, files[name])
            if problem:
                problems.append(problem)
    return Checkpoint(
        uri=source.uri,
        source=source,
        files=MappingProxyType(files),
        shards=shards,
        index=index,
        config=configs["config.json"],
        hf_quant_config=configs["hf_quant_config.json"],
        problems=tuple(problems),
    )


def _expect_headers(
    source: Source, names: Sequence[str], files: Mapping[str, int], index: Index | None
) -> None:
    """Announce the headers: first the length and a guess, then what the guess left out."""
    guesses = header_guesses(index.weight_map if index else {})
    source.expect((n, 0, min(files[n], 8 + guesses.get(n, FIRST_GUESS))) for n in names)
    source.expect([(n, 8, length) for n in names if (length := header_length(source, n, files[n]))])


_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def special_floats(value: Any) -> Any:
    """Return a config value in which {"__float__": "Infinity"}, transformers' spelling of a
    number that JSON does not have, is that number.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return _FLOATS.get(value["__float__"], value)
        return {k: special_floats(v) for k, v in value.items()}
    return [special_floats(v) for v in value] if isinstance(value, list) else value
