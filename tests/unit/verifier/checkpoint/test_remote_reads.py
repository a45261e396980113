# SPDX-License-Identifier: Apache-2.0
"""Which ranges a remote source requests for which reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier.checkpoint import remote
from verifier.checkpoint.remote import Interrupted, RemoteSource, merged
from verifier.errors import MachineError


class Recorded(RemoteSource):
    """Serves bytes from memory and notes the ranges; ``gate`` holds answers back."""

    def __init__(self, data: dict[str, bytes]) -> None:
        super().__init__("test://files")
        self.data = data
        self.ranges: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = self.most = 0

    def files(self) -> dict[str, int]:
        return {n: len(d) for n, d in self.data.items()}

    def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
        with self._lock:
            self.ranges.append((name, start, length))
            self.running += 1
            self.most = max(self.most, self.running)
        self.gate.wait(30)
        with self._lock:
            self.running -= 1
        self._count(requests=1, nbytes=length)
        yield self.data[name][start : start + length]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


RANGES = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 4000), st.integers(0, 900)), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RANGES, max_size=3), RANGES)
def test_every_read_has_the_files_bytes(
    announced: list[list[tuple[str, int, int]]], reads: list[tuple[str, int, int]]
) -> None:
    data = {"a": noise(5000), "b": noise(5000, 1)}
    source = Recorded(data)
    for ranges in announced:
        source.expect(ranges)
    for name, offset, length in [*reads, *(r for ranges in announced for r in ranges)]:
        expected = data[name][offset : offset + length]
        assert source.read(name, offset, length).tobytes() == expected


@settings(max_examples=200, deadline=None)
@given(RANGES)
def test_announced_ranges_are_covered_once_and_with_little_else(
    ranges: list[tuple[str, int, int]],
) -> None:
    wanted = {(n, i) for n, offset, length in ranges for i in range(offset, offset + length)}
    covered = [(s.name, i) for s in merged(ranges) for i in range(s.start, s.stop)]
    assert len(covered) == len(set(covered))
    assert wanted <= set(covered)
    assert len(covered) <= 1.05 * len(wanted)


def test_neighbours_are_one_request_and_others_are_not() -> None:
    spans = merged([("f", 1000, 100_000), ("f", 101_500, 200_000), ("f", 10**6, 4), ("g", 0, 8)])
    assert [(s.name, s.start, s.stop) for s in spans] == [
        ("f", 1000, 301_500),
        ("f", 10**6, 10**6 + 4),
        ("g", 0, 8),
    ]


def test_spans_come_in_the_order_of_their_first_read() -> None:
    spans = merged([("f", 500_000, 10), ("g", 7, 5), ("f", 0, 10)])
    assert [(s.name, s.start) for s in spans] == [("f", 500_000), ("g", 7), ("f", 0)]


def test_a_read_that_nobody_announced_is_exact() -> None:
    source = Recorded({"f": noise(10_000)})
    source.read("f", 123, 456)
    assert source.ranges == [("f", 123, 456)]


def test_what_was_announced_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Recorded({"f": noise(100_000)})
    ranges = [("f", i * 1000, 1000) for i in range(100)]
    source.expect(ranges)
    source.expect(ranges)
    for _ in range(2):
        for name, offset, length in ranges:
            source.read(name, offset, length)
    assert source.ranges == [("f", 0, 100_000)]


def test_at_most_sixteen_requests_run_at_a_time() -> None:
    source = Recorded({str(i): noise(100) for i in range(60)})
    source.gate.clear()
    source.expect((str(i), 0, 100) for i in range(60))
    readers = [threading.Thread(target=source.read, args=(str(i), 0, 100)) for i in range(16)]
    for thread in readers:
        thread.start()
    source.gate.set()
    for thread in readers:
        thread.join()
    for i in range(60):
        source.read(str(i), 0, 100)
    assert source.most == remote.IN_FLIGHT
    assert len(source.ranges) == 60


def test_memory_stays_in_the_budget_and_small_ranges_survive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "BUDGET", 50_000)
    monkeypatch.setattr(remote, "CHUNK", 10_000)
    data = noise(1_000_000)
    source = Recorded({"f": data})
    scales = [("f", i * 10_000, 9_000) for i in range(100)]
    scalars = [("f", i * 10_000 + 9_000, 8) for i in range(100)]
    source.expect([r for pair in zip(scales, scalars, strict=True) for r in pair])
    for name, offset, length in scales:
        assert source.read(name, offset, length).tobytes() == data[offset : offset + length]
        assert source._bytes <= 50_000 + 10_000
    requests = len(source.ranges)
    for name, offset, length in scalars:
        assert source.read(name, offset, length).tobytes() == data[offset : offset + length]
    assert len(source.ranges) - requests <= 5  # the last segments, which are still in memory


def test_a_large_read_is_cut_into_parallel_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 1000)
    data = noise(4500)
    source = Recorded({"f": data})
    assert source.read("f", 100, 4200).tobytes() == data[100:4300]
    assert sorted(source.ranges) == [
        ("f", 100 + 1000 * i, min(1000, 4200 - 1000 * i)) for i in range(5)
    ]


class Flaky(Recorded):
    """Ends each answer after some bytes."""

    def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
        with self._lock:
            self.ranges.append((name, start, length))
        yield self.data[name][start : start + min(length, 300)]
        if length > 300:
            raise Interrupted("cut")


def test_an_interrupted_read_resumes_and_gives_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "BACKOFF", 0.0)
    source = Flaky({"f": noise(10_000)})
    assert source.read("f", 0, 1000).tobytes() == noise(10_000)[:1000]
    assert source.ranges == [("f", 0, 1000), ("f", 300, 700), ("f", 600, 400), ("f", 900, 100)]
    with pytest.raises(MachineError, match=r"cannot read test://files/f: cut \(6 tries\)"):
        source.read("f", 0, 5000)


def test_a_failed_segment_raises_where_it_is_read() -> None:
    class Failing(Recorded):
        def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
            raise MachineError("no such luck")
            yield b""

    source = Failing({"f": noise(100)})
    source.expect([("f", 0, 50)])
    with pytest.raises(MachineError, match="no such luck"):
        source.read("f", 10, 5)


def test_pieces_into_a_buffer() -> None:
    data = noise(3000)
    source = Recorded({"f": data})
    source.expect([("f", 0, 3000)])
    out = np.empty(1000, np.uint8)
    for start in range(0, 3000, 1000):
        source.read_into("f", start, out)
        assert out.tobytes() == data[start : start + 1000]
