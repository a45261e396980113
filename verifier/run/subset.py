# SPDX-License-Identifier: Apache-2.0
"""Which modules are read: all of them, or one of several subsets that several machines read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from verifier.errors import UsageError
from verifier.schemes import Module

MAX_SUBSETS = 10_000


@dataclass(frozen=True, slots=True)
class Subset:
    """One of ``of`` subsets of the modules; ``number`` counts from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def is_first(self) -> bool:
        """Whether rules that need all modules run in this subset."""
        return self.number == 1


def subset_of(text: str) -> Subset:
    """Return the subset that ``2/8`` names.

    Raises:
        UsageError: not of that form, or a number out of range.
    """
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SUBSETS:
        raise UsageError(
            f"--subset {text!r}: write k/n, such as 2/8; k from 1 to n, n at most {MAX_SUBSETS:,}"
        )
    return Subset(int(match[1]), int(match[2]))


def file_of(module: Module) -> str:
    """Return the shard with which a module is read: its weight's, else that of its first tensor."""
    return (module.weight or next(iter(module.parts.values()))).file


def subset_numbers(sizes: Sequence[int], of: int) -> list[int]:
    """Return the number of the subset that each module belongs to, for modules in their order.

    Subsets have about equal sizes. Each is a run of consecutive modules, so that the modules of all
    subsets in their order are the checkpoint's; a large shard may lie in several.
    """
    total, before = max(1, sum(sizes)), 0
    numbers = []
    for size in sizes:
        middle = before + size / 2
        numbers.append(min(of, int(middle * of / total) + 1))
        before += size
    return numbers
