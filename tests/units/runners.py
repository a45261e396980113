# SPDX-License-Identifier: Apache-2.0
"""The runners that every test of units takes: shares one after the other, and at once; one process;
Ray on this machine, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

from verifier.ray_runner import on_ray
from verifier.units import Share

SHARES = tuple(Share(number, 3) for number in (1, 2, 3))


def one_after_the_other(job: Any) -> list[Any]:
    """Return what each share of three returns."""
    return [share(job) for share in SHARES]


def at_once(job: Any) -> list[Any]:
    """Return what each share of three returns that work at the same time."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda share: share(job), SHARES))


def alone(job: Any) -> list[Any]:
    """Return what one share of one returns."""
    return [Share(1, 1)(job)]


def by_ray(job: Any) -> list[Any]:
    """Return what Ray on this machine returns."""
    with on_ray(None, 1, lambda _done, _total: None) as runner:
        return [runner(job)]


NEEDS_RAY = pytest.mark.skipif(not find_spec("ray"), reason="needs the extra 'ray': tox -e ray")
RAY = pytest.param(by_ray, marks=NEEDS_RAY)
RUNNERS = (one_after_the_other, at_once, alone, RAY)


def result_of(run: Callable[[Any], list[Any]], job: Any) -> Any:
    """Return the result of a job: whoever found all units done has it."""
    return [value for value in run(job) if value is not None][-1]
