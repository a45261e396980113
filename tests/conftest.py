# SPDX-License-Identifier: Apache-2.0
"""Hypothesis profiles, the shared data folder, and numpy arrays to torch tensors and back.

``HYPOTHESIS_PROFILE``: ``ci`` (default, the same examples on every run) or ``nightly`` (random, ten
times as many). ``CKPTGATE_EXAMPLES``: the number of examples of the profile, where another is
wanted. ``CKPTGATE_TEST_DATA``: the shared data folder; ``CKPTGATE_REQUIRE_TEST_DATA=1`` makes its
absence a failure.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background commands so, and the processes of these tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
EXAMPLES = int(os.environ.get("CKPTGATE_EXAMPLES", "60"))
SLOW_MACHINE = [HealthCheck.too_slow]

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    print_blob=True,
    max_examples=EXAMPLES,
    suppress_health_check=SLOW_MACHINE,
)
settings.register_profile(
    "nightly",
    deadline=None,
    print_blob=True,
    max_examples=10 * EXAMPLES,
    suppress_health_check=SLOW_MACHINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Hold torch to one thread: many small operations on a busy machine collapse with two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the shared data folder, $CKPTGATE_TEST_DATA; without it the test is skipped, or fails
    where it is required.
    """
    place = os.environ.get("CKPTGATE_TEST_DATA", "")
    if place and Path(place).is_dir():
        return Path(place)
    reason = (
        f"CKPTGATE_TEST_DATA names no folder: {place!r}"
        if place
        else "CKPTGATE_TEST_DATA is not set"
    )
    if os.environ.get("CKPTGATE_REQUIRE_TEST_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module", params=["torch", "numba"])
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests under each back end of the codecs; the compiled one is skipped where
    numba is missing.
    """
    from exporter import codecs

    if request.param == "numba":
        pytest.importorskip("numba")
    codecs.use(request.param)
    yield request.param
    codecs.use(None)


def to_torch(array: Any) -> torch.Tensor:
    """Return a copy of a numpy array as a torch tensor; bfloat16 stays bfloat16, contiguous."""
    import torch

    own = np.array(array, order="C")
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def to_numpy(parts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return encoded parts as numpy arrays: raw bytes where a value is one byte, float32
    elsewhere.
    """
    import torch

    return {
        k: (v.view(torch.uint8) if v.element_size() == 1 else v).numpy().copy()
        for k, v in parts.items()
    }
