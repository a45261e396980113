# SPDX-License-Identifier: Apache-2.0
"""Results that several rules ask for, each worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResultKey:
    """What a result is, and of which module or tensor."""

    kind: str
    name: str


class ResultCache:
    """Small results, in two scopes.

    A result of one module or tensor is `exported` by a process that reads some shards and
    `imported` by the one that started it. A result of the whole checkpoint stays in the process
    that worked it out.
    """

    def __init__(self) -> None:
        self._by_name: dict[ResultKey, Any] = {}
        self._whole: dict[str, Any] = {}

    def of_name(self, kind: str, name: str, make: Callable[[], T]) -> T:
        """Return the result of one module or tensor; ``make`` is called on first use and its
        result must be picklable.
        """
        return _get(self._by_name, ResultKey(kind, name), make)

    def of_checkpoint(self, kind: str, make: Callable[[], T]) -> T:
        """Return a result of the whole checkpoint; ``make`` is called on first use."""
        return _get(self._whole, kind, make)

    def named(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Yield name and result of the results of one kind that are of a module or tensor, by
        name.
        """
        names = sorted(key.name for key in self._by_name if key.kind == kind)
        return ((name, self._by_name[ResultKey(kind, name)]) for name in names)

    def __len__(self) -> int:
        """Return the number of results of single modules and tensors."""
        return len(self._by_name)

    def exported(self, known: int) -> dict[ResultKey, Any]:
        """Return the results of single modules and tensors but the ``known`` oldest."""
        return dict(islice(self._by_name.items(), known, None))

    def imported(self, results: Mapping[ResultKey, Any]) -> None:
        """Add what another process exported."""
        self._by_name.update(results)


def _get(cache: dict[Any, Any], key: object, make: Callable[[], T]) -> T:
    if key not in cache:
        cache[key] = make()
    result: T = cache[key]
    return result
