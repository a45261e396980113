# SPDX-License-Identifier: Apache-2.0
"""Which documents of a run count, and which of them belong together.

A document that repeats an earlier one adds no information: it is counted once. Documents of one
group (a book, a conversation) are not independent: the group is then the sampling unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verifier.gate.jobs import Array

FEWEST = 8
"""Fewer clusters than this never pass: nothing is known of how they differ."""


@dataclass(frozen=True)
class Clusters:
    """The sampling units of D documents.

    ``numbers``: the cluster of each document, -1 for a repeated one, int64 [D]. ``count``: of the
    clusters. ``grouped``: whether a cluster is a group of documents.
    """

    numbers: Array
    count: int
    grouped: bool = False

    @property
    def distinct(self) -> Array:
        """Which documents count, bool [D]."""
        distinct: Array = self.numbers >= 0
        return distinct

    @property
    def repeated(self) -> int:
        """How many documents repeat an earlier one."""
        return int((~self.distinct).sum())

    def sums(self, values: Array) -> Array:
        """Return the sum of each cluster's documents, float64 [clusters], from values [D]."""
        distinct = self.distinct
        sums: Array = np.bincount(
            self.numbers[distinct], np.asarray(values, np.float64)[distinct], self.count
        )
        return sums


def clusters_of(documents: Sequence[str], groups: Sequence[int] = ()) -> Clusters:
    """Return the clusters of documents.

    Args:
        documents: their digests; equal ones are one document.
        groups: the group of each document; empty where every document is its own.
    """
    numbers = np.full(len(documents), -1, np.int64)
    seen: set[str] = set()
    names: dict[int, int] = {}
    for place, digest in enumerate(documents):
        if digest not in seen:
            seen.add(digest)
            name = groups[place] if groups else place
            numbers[place] = names.setdefault(name, len(names))
    return Clusters(numbers, len(names), bool(groups))
