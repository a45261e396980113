# SPDX-License-Identifier: Apache-2.0
"""The compiled loop says what the numpy code says: the sums of a block bit for bit on x86-64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier.reconstruction import compiled
from verifier.reconstruction.distance import Distance, RowChunk, distance, peak_of

FORMATS = ("nvfp4", "nvfp4_ct", "mxfp8")


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[list[object]]:
    """Load the compiled loop, and leave none behind for other tests."""
    pytest.importorskip("numba")
    compiled.prepare(compiled.WORTH_COMPILING)
    assert compiled.compare() is not None
    yield compiled._kernels
    compiled._kernels.clear()


def both(chunk: RowChunk, fmt: str) -> list[tuple[Distance, bool]]:
    """Return the distance as the compiled loop and as numpy find it."""
    amax, kernels = peak_of(chunk.reference), list(compiled._kernels)
    results = [distance([chunk], fmt, amax)]
    compiled._kernels.clear()
    try:
        return [*results, distance([chunk], fmt, amax)]
    finally:
        compiled._kernels.extend(kernels)


def chunk_of(fmt: str, seed: int, shape: tuple[int, int], kind: str) -> RowChunk:
    """Return a base and stored parts: drawn, extreme or broken."""
    rng = np.random.default_rng(seed)
    rows, width = shape[0], shape[1] * 32
    values = rng.standard_normal((rows, width)).astype(np.float32)
    if kind == "extreme":
        values *= np.float32(2.0) ** rng.integers(-60, 60, (rows, 1)).astype(np.float32)
        values[rng.random(values.shape) < 0.2] = 0
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "broken":
        bits[0, 0] = rng.choice([0x7F80, 0x7FC0, 0xFF80, 0x0001, 0x8000, 0x7F7F])
    packed = fmt != "mxfp8"
    block = 16 if packed else 32
    codes = rng.integers(0, 256, (rows, width // 2 if packed else width)).astype(np.uint8)
    low, high = (0, 256) if kind == "broken" else (0x20, 0x60) if packed else (110, 140)
    parts = {"weight": codes}
    parts["weight_scale"] = rng.integers(low, high, (rows, width // block)).astype(np.uint8)
    if kind != "broken" and not packed:
        codes[(codes & 0x7F) == 0x7F] = 1
    if packed:
        leaf = "weight_global_scale" if fmt == "nvfp4_ct" else "weight_scale_2"
        size = rng.choice([0.001, 1.0, 0.0, np.nan, np.inf]) if kind == "broken" else 0.01
        parts[leaf] = np.float32(size).reshape(())
    return RowChunk(parts, bits)


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(["drawn", "extreme", "broken"]),
)
def test_the_compiled_loop_agrees_with_numpy(
    fmt: str, seed: int, shape: tuple[int, int], kind: str
) -> None:
    (own, defined), (reference, also_defined) = both(chunk_of(fmt, seed, shape, kind), fmt)
    assert (own.suspect, defined) == (reference.suspect, also_defined)
    rtol = 1e-12 if platform.machine() == "x86_64" else 1e-5  # only blocks are added in any order
    for name in ("size", "error", "by_max", "along"):
        size = max(1.0, abs(reference.size))
        assert getattr(own, name) == pytest.approx(
            getattr(reference, name), rel=rtol, abs=rtol * size, nan_ok=True
        ), name


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_agrees_on_more_blocks_than_it_holds_at_a_time(fmt: str) -> None:
    own, reference = both(chunk_of(fmt, 7, (130, 70), "drawn"), fmt)
    assert own[0].suspect == reference[0].suspect
    assert own[0].by_max == pytest.approx(reference[0].by_max, rel=1e-6)
    assert own[0].error == pytest.approx(reference[0].error, rel=1e-6)


RUN = """
import sys
from verifier.reconstruction import compiled
if sys.argv[1] == "absent":
    sys.modules["numba"] = None
compiled.prepare(int(sys.argv[2]))
print(compiled.compare() is not None, "numba" in sys.modules)
"""


@pytest.mark.parametrize(
    ("numba", "nbytes", "fast", "result"),
    [
        ("present", compiled.WORTH_COMPILING - 1, "1", "False False"),
        ("present", compiled.WORTH_COMPILING, "0", "False False"),
        ("absent", compiled.WORTH_COMPILING, "1", "False True"),
    ],
    ids=["small", "off", "absent"],
)
def test_numba_is_loaded_only_where_it_is_worth_it(
    numba: str, nbytes: int, fast: str, result: str
) -> None:
    environment = {**os.environ, "CKPTGATE_FAST": fast}
    done = subprocess.run(
        [sys.executable, "-c", RUN, numba, str(nbytes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == result.split()


def test_a_cache_that_cannot_be_written_ends_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    caching = pytest.importorskip("numba.core.caching")
    kernels = pytest.importorskip("verifier.reconstruction.kernels")
    monkeypatch.setattr(
        caching.CompileResultCacheImpl, "_locator_classes", []
    )  # as where no folder can be
    with pytest.raises(RuntimeError, match="cannot cache"):
        pytest.importorskip("numba").njit(cache=True)(_plus_one)
    assert kernels._compiled()(_plus_one)(1) == 2


def _plus_one(value: int) -> int:
    return value + 1
