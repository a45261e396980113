# SPDX-License-Identifier: Apache-2.0
"""A random sample of the modules: which ones are read, and how many modules they represent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from verifier.errors import UsageError
from verifier.schemes import Module, Signature


@dataclass(frozen=True, slots=True)
class Sample:
    """``percent`` of the modules of each kind (equal leaves, dtypes and shapes), at least one; the
    seed chooses which.
    """

    percent: float
    seed: int = 0

    def __str__(self) -> str:
        return f"a sample of {self.percent:g}% (seed {self.seed})"

    def choose(self, modules: Iterable[Module]) -> list[tuple[list[Module], int]]:
        """Return for each kind the modules that are read, in their order, and the number of modules
        of that kind.

        The choice depends on names and seed, not on the order or number of shards.
        """
        groups: dict[Signature, list[Module]] = {}
        for module in modules:
            groups.setdefault(module.signature, []).append(module)
        chosen = []
        for group in groups.values():
            count = math.ceil(len(group) * self.percent / 100)
            names = {m.name for m in sorted(group, key=self._rank)[:count]}
            chosen.append(([m for m in group if m.name in names], len(group)))
        return chosen

    def _rank(self, module: Module) -> bytes:
        return hashlib.blake2b(
            f"{self.seed}:{module.name}".encode(errors="surrogatepass"), digest_size=8
        ).digest()


def sample_of(text: str | float, seed: int = 0) -> Sample | None:
    """Return the sample that ``5%`` or ``5`` names, None for ``100%``.

    Raises:
        UsageError: not a number, or not above 0 and at most 100.
    """
    try:
        percent = float(str(text).strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 0 < percent <= 100:
        raise UsageError(
            f"--sample {text!r}: write a percentage above 0 and at most 100, such as 5%"
        )
    return Sample(percent, seed) if percent < 100 else None
