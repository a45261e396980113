# SPDX-License-Identifier: Apache-2.0
"""Shows on stderr that long work advances: a bar on a terminal, a line every 30 seconds elsewhere,
or JSON lines (``--progress``).

Drawing needs no thread: a check forks, and a fork copies no other thread. A timer signal draws
where this is the main thread; where it is not, each report of progress does.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TextIO

from verifier.cli.terminal import terminal
from verifier.progress import Progress
from verifier.text import counted, printable, size

if TYPE_CHECKING:
    from verifier.checkpoint.address import Address
    from verifier.checkpoint.source import Source

BAR_SECONDS, LINE_SECONDS, JSON_SECONDS = 0.2, 30.0, 1.0
_MIN_SECONDS = 1.0
"""A rate is shown from so many seconds on; before, it says nothing."""


@dataclass
class TrackedJob:
    """One piece of long work.

    Attributes:
        label: what is done, as a participle: ``checking``.
        unit: what ``done`` and ``total`` count, in the singular; ``byte`` is shown as a size.
        more: returns a further remark, for example what was fetched.
        clock: returns seconds.
    """

    label: str
    unit: str = ""
    more: Callable[[], str] = str
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    total: int = 0
    detail: str = ""
    started: float = field(init=False)
    _first: tuple[float, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Take how much is done."""
        # What a resumed job finds done is no speed, nor is the time before the total is known; a
        # smaller number begins another stage.
        if total and (not self.total or done < self.done):
            self._first = (self.clock(), done)
        self.done, self.total, self.detail = done, total, detail

    @property
    def seconds(self) -> float:
        """The time since the job began."""
        return self.clock() - self.started

    @property
    def rate(self) -> float:
        """Units per second, 0 where it is not known yet."""
        start, before = self._first or (self.started, 0)
        passed = self.clock() - start
        return max(0, self.done - before) / passed if passed >= _MIN_SECONDS else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at this rate, None where that is not known."""
        rate = self.rate
        return (self.total - self.done) / rate if rate and self.total > self.done else None

    def amount(self) -> str:
        """Return ``12.4 GB of 250.0 GB (5%)``, ``3 of 72 documents``, or ''."""
        if not self.total:
            return ""
        share = f" ({100 * self.done // self.total}%)"
        if self.unit == "byte":
            return f"{size(self.done)} of {size(self.total)}{share}"
        of = counted(self.total, self.unit) if self.unit else f"{self.total:,}"
        return f"{self.done:,} of {of}{share}"

    def remarks(self) -> list[str]:
        """Return amount, detail, rate and time left, as far as they are known."""
        rate, left = self.rate, self.left
        speed = f"{size(int(rate))}/s" if self.unit == "byte" and rate >= 1 else ""
        rest = f"{duration(left)} left" if left is not None else ""
        texts = [self.amount(), printable(self.detail, 80), speed, self.more(), rest]
        return [text for text in texts if text]

    def as_json(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "task": self.label,
            "done": self.done,
            "total": self.total or None,
            "unit": f"{self.unit}s" if self.unit else None,
            "detail": self.detail or self.more() or None,
            "seconds": round(self.seconds, 1),
            "rate": round(self.rate, 3) or None,
            "left": round(self.left, 1) if self.left is not None else None,
        }


def duration(seconds: float) -> str:
    """Return ``45 s``, ``12 min`` or ``3 h 20 min``, rounded up."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = -(-round(seconds) // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Display(Protocol):
    """Draws a job every so many seconds."""

    every: float

    def draw(self, job: TrackedJob) -> None:
        """Draw a job as it is now."""

    def close(self, job: TrackedJob) -> None:
        """Draw for the last time, or remove what was drawn."""


class Lines:
    """A line of text per interval, for a log."""

    every = LINE_SECONDS

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, job: TrackedJob) -> None:
        """Print a line."""
        remarks = job.remarks() or [duration(job.seconds)]
        self._stream.write(f"ckptgate: {job.label}: {', '.join(remarks)}\n")
        self._stream.flush()

    def close(self, job: TrackedJob) -> None:
        """Print nothing."""


class JsonLines:
    """A JSON object per line and interval, and one at the end, for programs."""

    every = JSON_SECONDS

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, job: TrackedJob) -> None:
        """Print an object."""
        self._stream.write(json.dumps(job.as_json()) + "\n")
        self._stream.flush()

    def close(self, job: TrackedJob) -> None:
        """Print the last object."""
        self.draw(job)


class Bar:
    """A bar on a terminal, removed at the end."""

    every = BAR_SECONDS

    def __init__(self) -> None:
        from rich import progress  # noqa: PLC0415  (of use on a terminal only)
        from rich.console import Console  # noqa: PLC0415

        text = progress.TextColumn("{task.description}", markup=False)
        remarks = progress.TextColumn("{task.fields[remarks]}", markup=False)
        columns = (progress.SpinnerColumn(), text, progress.BarColumn(30), remarks)
        console = Console(stderr=True, no_color=not terminal().color_of(sys.stderr))
        self._bar = progress.Progress(
            *columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False
        )
        self._task = self._bar.add_task("", total=None, remarks="")
        self._bar.start()

    def draw(self, job: TrackedJob) -> None:
        """Draw the bar."""
        remarks = ", ".join(job.remarks() or [duration(job.seconds)])
        total = job.total or None
        self._bar.update(
            self._task, description=job.label, completed=job.done, total=total, remarks=remarks
        )
        self._bar.refresh()

    def close(self, job: TrackedJob) -> None:
        """Remove the bar."""
        self._bar.stop()


class Ticker:
    """Draws the innermost of the running jobs, at most once per interval."""

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self.display, self.jobs = display, list[TrackedJob]()
        self._clock, self._lock = clock, threading.Lock()
        self._due = clock() + (0.0 if display.every < 1 else display.every)

    def tick(self) -> None:
        """Draw if it is time to; a thread that finds another one drawing does not wait."""
        if self._clock() < self._due or not self.jobs or not self._lock.acquire(blocking=False):
            return
        try:
            self._due = self._clock() + self.display.every
            # A signal may come while the same stream is being written to: the next one draws.
            with suppress(OSError, RuntimeError):
                self.display.draw(self.jobs[-1])
        finally:
            self._lock.release()

    def progress_of(self, job: TrackedJob) -> Progress:
        """Return the callback for a job."""

        def update(done: int, total: int, detail: str = "", /) -> None:
            job.update(done, total, detail)
            self.tick()

        return update


_ticker: Ticker | None = None


@contextmanager
def progress_bar(
    label: str, *, unit: str = "", more: Callable[[], str] = str
) -> Iterator[Progress]:
    """Show that work advances inside the block, and yield the callback that it reports to.

    Inside another block the inner work is shown in place of the outer one.

    Args:
        label: what is done: ``checking``.
        unit: what is counted, in the singular; ``byte`` is shown as a size.
        more: returns a further remark.
    """
    global _ticker
    job, outer = TrackedJob(label, unit, more), _ticker
    display = None if outer else _display()
    if outer is None and display is None:
        yield job.update
        return
    ticker = _ticker = outer or Ticker(display)  # type: ignore[arg-type]
    ticker.jobs.append(job)
    timer: AbstractContextManager[None] = nullcontext() if outer else _timer(ticker)
    try:
        with timer:
            yield ticker.progress_of(job)
    finally:
        if display is not None:
            display.close(job)
        ticker.jobs.remove(job)
        _ticker = outer


def traffic_of(sources: Mapping[Address, Source]) -> Callable[[], str]:
    """Return a function that says what remote sources fetched so far, '' for nothing."""

    def text() -> str:
        amounts = [s.traffic() for s in list(sources.values())]
        nbytes, requests = sum(a.nbytes for a in amounts), sum(a.requests for a in amounts)
        return f"fetched {size(nbytes)} in {counted(requests, 'request')}" if requests else ""

    return text


def _display() -> Display | None:
    mode = terminal().progress_mode()
    if mode == "bar":
        return Bar()
    if mode == "plain":
        return Lines(sys.stderr)
    return JsonLines(sys.stderr) if mode == "json" else None


@contextmanager
def _timer(ticker: Ticker) -> Iterator[None]:
    """Call ``ticker.tick`` by a timer signal inside the block, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tick(_number: int, _frame: FrameType | None) -> None:
        ticker.tick()

    before = signal.signal(signal.SIGALRM, tick)
    signal.siginterrupt(signal.SIGALRM, False)  # libraries need not retry their calls
    interval = min(1.0, ticker.display.every)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
