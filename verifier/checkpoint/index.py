# SPDX-License-Identifier: Apache-2.0
"""The index: which shard should hold which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import PurePosixPath

from verifier.checkpoint.header import Problem, read_json
from verifier.checkpoint.source import Source

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Index:
    """``model.safetensors.index.json``: which shard should hold which tensor."""

    weight_map: Mapping[str, str]
    total_size: int | None
    problems: tuple[Problem, ...]

    @cached_property
    def names_by_file(self) -> Mapping[str, Sequence[str]]:
        """The tensors that each file should hold, in order."""
        names: dict[str, list[str]] = {}
        for file, of_file in groupby(self.weight_map, self.weight_map.__getitem__):
            names.setdefault(file, []).extend(of_file)
        return names


def read_index(source: Source, files: Mapping[str, int]) -> Index:
    """Return the parsed index; never raises for what the file holds."""
    value, problem = read_json(source, INDEX, files[INDEX])
    if problem:
        return Index({}, None, (problem,))
    problems: list[Problem] = []
    raw = value.get("weight_map")
    if not isinstance(raw, dict):
        problems.append(Problem("json", INDEX, "has no weight_map object"))
        raw = {}
    named = {file for file in raw.values() if isinstance(file, str)}
    plain = {file for file in named if plain_name(file)}
    wrong = {n: f for n, f in raw.items() if not isinstance(f, str) or f not in plain}
    for name, file in wrong.items():
        message = f"names the shard {str(file)[:80]!r}, which is not a plain file name"
        problems.append(Problem("path", INDEX, message, name))
    weight_map = {n: f for n, f in raw.items() if n not in wrong} if wrong else raw
    metadata = value.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    return Index(weight_map, total if type(total) is int else None, tuple(problems))


@lru_cache(maxsize=4096)
def plain_name(file: str) -> bool:
    """Whether a file name is one of this directory: no path, no URL."""
    return (
        file == PurePosixPath(file).name
        and "\\" not in file
        and "\0" not in file
        and file not in ("", ".", "..")
    )


FIRST_GUESS = 1024
"""Bytes that are asked for of a header whose shard no index describes."""


def header_guesses(weight_map: Mapping[str, str]) -> dict[str, int]:
    """Return how long the header of each shard may be, in bytes, by the names that it holds.

    An entry of a header is the name, dtype, shape and two offsets: about 80 characters besides the
    name. A guess that is too short costs a second request.
    """
    guesses: dict[str, int] = {}
    for name, file in weight_map.items():
        guesses[file] = guesses.get(file, 64) + len(name.encode("utf-8", "replace")) + 84
    return guesses
