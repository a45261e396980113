# SPDX-License-Identifier: Apache-2.0
"""Which shards are read: all of them, or the k-th of n shares that several machines take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from verifier.checkpoint import Checkpoint
from verifier.errors import UsageError
from verifier.schemes import Module

MAX_SHARES = 10_000


@dataclass(frozen=True, slots=True)
class Share:
    """The ``number``-th of ``of`` shares, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def share_of(text: str) -> Share:
    """Return the share that ``2/8`` names.

    Raises:
        UsageError: anything else, or a share that is not one of as many.
    """
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= MAX_SHARES:
        raise UsageError(
            f"--subset {text!r}: write k/n, such as 2/8; k from 1 to n, n at most {MAX_SHARES:,}"
        )
    return Share(int(found[1]), int(found[2]))


def file_of(module: Module) -> str:
    """Return the shard with which a module is read: its weight's, else that of its first tensor."""
    return (module.weight or next(iter(module.parts.values()))).file


def shares(checkpoint: Checkpoint, of: int) -> Mapping[str, int]:
    """Return the number of the share that each shard belongs to; a share is consecutive shards,
    shares are about equal.

    Consecutive, so that shares put together in their order are the shards in theirs.
    """
    sizes = {s.file: sum(t.nbytes for t in s.tensors.values()) for s in checkpoint.shards}
    total, before = max(1, sum(sizes.values())), 0
    found = {}
    for file, size in sizes.items():
        middle = before + size / 2
        found[file] = min(of, int(middle * of / total) + 1)
        before += size
    return found
