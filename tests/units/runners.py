# SPDX-License-Identifier: Apache-2.0
"""The runners that every test of units takes: shares one after the other, and at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from verifier.units import Share

SHARES = tuple(Share(number, 3) for number in (1, 2, 3))


def one_after_the_other(job: Any) -> list[Any]:
    """Return what each share of three returns."""
    return [share(job) for share in SHARES]


def at_once(job: Any) -> list[Any]:
    """Return what each share of three returns that work at the same time."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda share: share(job), SHARES))


RUNNERS = (one_after_the_other, at_once)


def result_of(run: Callable[[Any], list[Any]], job: Any) -> Any:
    """Return the result of a job: exactly one of those who did it has it."""
    (result,) = [value for value in run(job) if value is not None]
    return result
