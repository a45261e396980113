# SPDX-License-Identifier: Apache-2.0
"""Many names as few lines: layer and expert numbers become ranges, with a count."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from verifier.schemes import collapse

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
MAX_RANGES = 6


@dataclass
class NameGroup:
    """Names of one pattern: ``example`` is the first, ``slots`` are the numbers at each ``*``."""

    pattern: str
    example: str
    count: int = 0
    slots: list[set[int]] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a name of this pattern."""
        numbers = _NUMBER.findall(name)
        if not self.count:
            self.slots = [set() for _ in numbers]
        # A name may have a star where others have a number, hence strict=False.
        for slot, number in zip(self.slots, numbers, strict=False):
            slot.add(int(number[:18]))  # int() refuses thousands of digits of a hostile name
        self.count += 1

    @property
    def label(self) -> str:
        """The pattern with its numbers as ranges: ``layers.{3-59}.mlp.experts.{0-127}.w1``."""
        if self.count == 1:
            return self.example
        parts = self.pattern.split("*")
        if len(parts) != len(self.slots) + 1:  # the name itself has a star
            return self.pattern
        texts = [_ranges(s) for s in self.slots]
        texts = [f"{{{t}}}" if "-" in t or "," in t else t for t in texts]
        return parts[0] + "".join(t + p for t, p in zip(texts, parts[1:], strict=True))

    @property
    def spanned(self) -> int:
        """The number of names that the ranges cover; more than ``count`` if some are missing."""
        total = 1
        for slot in self.slots:
            total *= len(slot)
        return total


def gathered(names: Iterable[str]) -> list[NameGroup]:
    """Return names by pattern, in order of first appearance."""
    groups: dict[str, NameGroup] = {}
    for name in names:
        pattern = collapse(name)
        groups.setdefault(pattern, NameGroup(pattern, name)).add(name)
    return list(groups.values())


def _ranges(numbers: set[int]) -> str:
    """Return numbers as ``0-2,5``; at most `MAX_RANGES` ranges."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:MAX_RANGES]]
    return ",".join(texts) + (",…" if len(runs) > MAX_RANGES else "")
