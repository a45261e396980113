# SPDX-License-Identifier: Apache-2.0
"""Sources behind a network: which ranges are requested, when, and how often.

Reads that were announced (`Source.expect`) are merged with their neighbours and fetched ahead, up
to `IN_FLIGHT` requests at a time and `BUDGET` bytes in memory. Any other read is one exact range.
Nothing is fetched twice while it fits into the budget.
"""

from __future__ import annotations

import bisect
import queue
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from verifier.checkpoint.source import Bytes, Source, Traffic
from verifier.errors import MachineError

A = TypeVar("A")
T = TypeVar("T")
IN_FLIGHT = 16
IDLE = 5.0
"""Seconds after which a thread without work ends."""
CHUNK = 8 << 20
"""The most bytes of one request."""
BUDGET = 128 << 20
"""Bytes that a source holds in memory, read ahead or for a second reading."""
MAX_GAP = 64 << 10
WASTE = 20
"""A gap is fetched with its neighbours where it adds at most a twentieth to their bytes."""
SMALL = 4096
"""Announced ranges up to this size stay in memory when the segment around them is dropped."""
TRIES = 6
PROGRESS = 64 << 10
"""A try that got this many bytes does not count as a failure."""
BACKOFF = 0.5
"""Seconds before the second try; each later wait is twice as long."""
MAX_WAIT = 300.0
"""The longest ``Retry-After`` in seconds that is waited for."""


class Interrupted(Exception):
    """A request failed in a way that a later one may not; ``wait`` is what the server asks for, in
    seconds.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file, and the announced ranges in them."""

    name: str
    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]


def merged(ranges: Iterable[tuple[str, int, int]]) -> list[Span]:
    """Return announced ranges (file, offset, length) with near neighbours merged and cut into
    chunks, in the order in which they are needed.
    """
    files: dict[str, list[_Part]] = {}
    for order, (name, offset, length) in enumerate(ranges):
        if length:
            files.setdefault(name, []).append(_Part(offset, offset + length, order))
    spans: list[tuple[int, Span]] = []
    for name, parts in files.items():
        for group in _neighbours(sorted(parts)):
            spans += _chunks(name, group)
    return [span for _, span in sorted(spans, key=lambda s: s[0])]


class _Part(NamedTuple):
    start: int
    stop: int
    order: int


def _neighbours(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Yield groups of parts, sorted by start, that are fetched as one range."""
    group: list[_Part] = []
    end = announced = wasted = 0
    for part in parts:
        gap = max(0, part.start - end) if group else 0
        size = max(0, part.stop - max(part.start, end))
        if gap and (gap > MAX_GAP or (wasted + gap) * WASTE > announced + size):
            yield group
            group, announced, wasted, gap = [], 0, 0, 0
        group.append(part)
        end, announced, wasted = max(end, part.stop), announced + size, wasted + gap
    if group:
        yield group


def _chunks(name: str, group: Sequence[_Part]) -> Iterator[tuple[int, Span]]:
    """Yield spans of at most `CHUNK` bytes, each with the place of its first read in the order."""
    for begin in range(group[0].start, max(p.stop for p in group), CHUNK):
        inside = [p for p in group if p.start < begin + CHUNK and p.stop > begin]
        if inside:
            end = min(begin + CHUNK, max(p.stop for p in inside))
            whole = tuple((p.start, p.stop) for p in inside if p.start >= begin and p.stop <= end)
            yield min(p.order for p in inside), Span(name, begin, end, whole)


@dataclass(eq=False, slots=True)
class _Segment:
    """A span that is planned (no future), in flight or in memory."""

    span: Span
    batch: _Batch
    number: int
    future: Future[Bytes] | None = None
    used: int = 0

    @property
    def size(self) -> int:
        return self.span.stop - self.span.start


@dataclass(eq=False, slots=True)
class _Batch:
    """The segments of one announcement: those before ``reached`` were read or skipped."""

    segments: list[_Segment] = field(default_factory=list)
    started: int = 0
    reached: int = 0


class RemoteSource(Source):
    """A source that fetches ranges; subclasses implement `_stream` and `files`."""

    remote = True

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.RLock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = self._busy = 0
        self._segments: dict[str, list[_Segment]] = {}
        self._batches: list[_Batch] = []
        self._held: OrderedDict[_Segment, None] = OrderedDict()
        self._bytes = 0
        self._small: dict[tuple[str, int, int], Bytes] = {}
        self._requests = self._fetched = 0
        self._stop = threading.Event()

    @abstractmethod
    def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes of a file from ``start``, or fewer where the connection ends.

        Raises:
            Interrupted: a later try may succeed.
            CkptgateError: it will not.
        """

    def traffic(self) -> Traffic:
        """Return requests and bytes so far, redirects and failed requests included."""
        with self._lock:
            return Traffic(self._requests, self._fetched)

    def close(self) -> None:
        """Drop what is held in memory."""
        with self._lock:
            self._segments.clear()
            self._batches.clear()
            self._held.clear()
            self._small.clear()
            self._bytes = 0

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Fetch ranges ahead of their reads, in the order in which they are announced."""
        with self._lock:
            batch = _Batch()
            for span in merged(ranges):
                for part in self._uncovered(span):
                    segment = _Segment(part, batch, len(batch.segments))
                    batch.segments.append(segment)
                    known = self._segments.setdefault(part.name, [])
                    bisect.insort(known, segment, key=_start)
            if batch.segments:
                self._batches.append(batch)
                self._read_ahead()

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes of ``name`` from ``offset``."""
        small = self._small.get((name, offset, out.size))
        if small is not None:
            out[:] = small
            return
        position, end = offset, offset + out.size
        while position < end:
            with self._lock:
                segment, stop = self._at(name, position)
            stop = min(stop, end)
            view = out[position - offset : stop - offset]
            if segment is None:
                self._fetch_now(name, position, view)
            else:
                view[:] = self._segment_bytes(segment, position, stop)
            position = stop

    def _at(self, name: str, position: int) -> tuple[_Segment | None, int]:
        """Return the segment that holds a position and where it stops; without one, where the next
        segment starts.
        """
        known = self._segments.get(name, [])
        place = bisect.bisect_right(known, position, key=_start)
        if place and known[place - 1].span.stop > position:
            return known[place - 1], known[place - 1].span.stop
        return None, known[place].span.start if place < len(known) else 1 << 62

    def _uncovered(self, span: Span) -> Iterator[Span]:
        """Yield the parts of a span that no segment holds."""
        position = span.start
        while position < span.stop:
            segment, stop = self._at(span.name, position)
            stop = min(stop, span.stop)
            if segment is None:
                inside = tuple(r for r in span.ranges if r[0] >= position and r[1] <= stop)
                yield Span(span.name, position, stop, inside)
            position = stop

    def _segment_bytes(self, segment: _Segment, start: int, stop: int) -> Bytes:
        with self._lock:
            segment.batch.reached = max(segment.batch.reached, segment.number)
            if segment.future is None:
                self._start(segment)
            future = segment.future
            self._read_ahead()
        assert future is not None  # noqa: S101 (set above, under the lock)
        data = self._result(future)
        with self._lock:
            segment.used += stop - start
            if segment in self._held:
                self._held.move_to_end(segment, last=segment.used < segment.size)
        begin = segment.span.start
        return data[start - begin : stop - begin]

    def _read_ahead(self) -> None:
        """Start planned segments while requests and memory are free; the lock is held."""
        for batch in list(self._batches):
            while batch.started < len(batch.segments):
                segment = batch.segments[batch.started]
                if segment.future is None:
                    if self._busy >= IN_FLIGHT or not self._make_room(segment.size):
                        return
                    self._start(segment)
                batch.started += 1
            self._batches.remove(batch)

    def _start(self, segment: _Segment) -> None:
        self._make_room(segment.size)
        out = np.empty(segment.size, np.uint8)
        self._bytes += segment.size
        self._held[segment] = None
        segment.future = self._submit(
            lambda: self._fetch(segment.span.name, segment.span.start, out)
        )
        segment.future.add_done_callback(lambda _: self._finished())

    def _finished(self) -> None:
        with self._lock:
            self._read_ahead()

    def _make_room(self, size: int) -> bool:
        """Drop segments that were read or passed over until ``size`` more bytes fit; return whether
        they do.
        """
        for segment in list(self._held):
            if self._bytes + size <= BUDGET:
                break
            passed = segment.used or segment.number < segment.batch.reached
            if passed and segment.future is not None and segment.future.done():
                self._drop(segment)
        return self._bytes + size <= BUDGET

    def _drop(self, segment: _Segment) -> None:
        del self._held[segment]
        self._bytes -= segment.size
        self._segments[segment.span.name].remove(segment)
        if segment.future is not None and segment.future.exception() is None:
            data, begin = segment.future.result(), segment.span.start
            for start, stop in segment.span.ranges:
                if stop - start <= SMALL:
                    key = segment.span.name, start, stop - start
                    self._small[key] = data[start - begin : stop - begin].copy()

    def _fetch_now(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with a range that nobody announced, in chunks side by side."""
        parts = [(start + i, out[i : i + CHUNK]) for i in range(0, out.size, CHUNK)]
        self._all(parts, lambda part: self._fetch(name, *part))

    def _all(self, items: Iterable[A], call: Callable[[A], T]) -> list[T]:
        """Return the result for each item, in their order; requests run at the same time."""
        futures = [self._submit(partial(call, item)) for item in items]
        return [self._result(future) for future in futures]

    def _result(self, future: Future[T]) -> T:
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            self._stop.set()
            raise

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call. The threads are daemons: an interrupted command does not wait for them."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 (raised where the result is read)
                self._end_job()
                future.set_exception(error)
            else:
                self._end_job()
                future.set_result(result)

        with self._lock:
            self._busy += 1
            if self._threads < min(IN_FLIGHT, self._busy):
                self._threads += 1
                threading.Thread(target=self._work, name="ckptgate-fetch", daemon=True).start()
        self._jobs.put(job)
        return future

    def _end_job(self) -> None:
        with self._lock:
            self._busy -= 1

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._threads -= 1
                        return
            else:
                job()

    def _fetch(self, name: str, start: int, out: Bytes) -> Bytes:
        """Fill and return ``out``; after an interruption, resume at the first missing byte."""
        done = failures = 0
        while True:
            before = done
            try:
                for chunk in self._stream(name, start + done, out.size - done):
                    if self._stop.is_set():
                        raise MachineError(f"{self._label(name)}: interrupted")
                    out[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    done += len(chunk)
                if done == out.size:
                    return out
                raise Interrupted(f"the connection ended after {done:,} of {out.size:,} bytes")
            except Interrupted as error:
                failures = 1 if done - before >= PROGRESS else failures + 1
                self._pause(failures, error, f"cannot read {self._label(name)}")

    def _pause(self, failures: int, error: Interrupted, action: str) -> None:
        """Wait before the next try.

        Raises:
            MachineError: that was the last one, or the server asks for a longer wait.
        """
        if failures >= TRIES:
            raise MachineError(f"{action}: {error} ({TRIES} tries)") from None
        if error.wait is not None and error.wait > MAX_WAIT:
            raise MachineError(
                f"{action}: {error}; the server asks to wait {error.wait:.0f} s"
            ) from None
        if self._stop.wait(error.wait if error.wait is not None else BACKOFF * 2 ** (failures - 1)):
            raise MachineError(f"{action}: interrupted")

    def _count(self, requests: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            self._requests += requests
            self._fetched += nbytes

    def _label(self, name: str) -> str:
        return f"{self.uri.rstrip('/')}/{name}"


def _start(segment: _Segment) -> int:
    return segment.span.start
