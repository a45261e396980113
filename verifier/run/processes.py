# SPDX-License-Identifier: Apache-2.0
"""Work that is shared by copies of this process: two threads of numpy are 1.5 times one, two
processes 1.9 times.

A copy (fork) has all that was worked out so far and is sent nothing but numbers; what it comes to
is sent back. Where a process cannot be copied safely (other threads run in it, or in a source that
is read over the net) threads do the work.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from verifier.errors import CkptgateError, MachineError

T = TypeVar("T")
_STOP_SECONDS = 5.0


def can_be_copied() -> bool:
    """Whether this process may be copied: on Linux, with no other Python thread, and allowed to
    have children.
    """
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and not multiprocessing.current_process().daemon
    )


def by_copies(
    work: Callable[[int], T], order: Sequence[int], workers: int
) -> Iterator[tuple[int, T]]:
    """Yield (number, ``work(number)``) of each number of ``order``, which are begun in that order,
    as they end.

    Args:
        work: runs in a copy of this process; what it returns is pickled, what it changes is lost.
        order: the numbers to work on.
        workers: copies, at most one a number.

    Raises:
        MachineError: a copy died.
        Exception: what ``work`` raised.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(order))
    copies: dict[Any, Any] = {}
    connection: Any
    # What stays is not to be written to by a collection, in whichever copy: pages are shared until
    # they are written to.
    gc.freeze()
    try:
        # A signal that arrives now waits until no copy can take it with this process's handlers.
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for _ in range(min(workers, len(order))):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(work, theirs, [*copies, ours]), daemon=True
                )
                with (
                    warnings.catch_warnings()
                ):  # numpy's own threads wait in C; Python 3.12 counts them
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                theirs.close()
                copies[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        for connection, process in copies.items():
            _send(connection, process, waiting.pop())
        while copies:
            for found in wait(list(copies)):
                connection = found
                number, value, error = _receive(connection, copies[connection])
                if error is not None:
                    raise error
                if waiting:
                    _send(connection, copies[connection], waiting.pop())
                else:
                    connection.close()
                    copies.pop(connection).join(_STOP_SECONDS)
                yield number, value
    finally:
        for process in copies.values():
            process.kill()  # it holds nothing but what it reads
        for process in copies.values():
            process.join(_STOP_SECONDS)
        gc.unfreeze()


def _send(connection: Any, process: Any, number: int) -> None:
    try:
        connection.send(number)
    except OSError:
        raise _death(process) from None


def _receive(connection: Any, process: Any) -> tuple[int, Any, BaseException | None]:
    try:
        found: tuple[int, Any, BaseException | None] = connection.recv()
    except (EOFError, OSError):
        raise _death(process) from None
    return found


def _death(process: Any) -> MachineError:
    process.join(_STOP_SECONDS)
    code = process.exitcode or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return MachineError(
        f"a process that reads bytes died ({how}); --workers 1 reads in this one alone"
    )


def _serve(work: Callable[[int], object], connection: Connection, others: list[Connection]) -> None:
    # The terminal sends Ctrl-C to the whole group: the parent decides what happens to its copies.
    # SIGINT stays blocked.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # Held here too, they would keep a copy waiting for a parent that was killed.
    for end in others:
        end.close()
    while True:
        try:
            number = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[int, object, Exception | None] = (number, work(number), None)
        except Exception as error:  # noqa: BLE001  (raised again in the parent)
            answer = (number, None, _portable(error))
        try:
            connection.send(answer)
        except BrokenPipeError:
            return  # the parent was killed


def _portable(error: Exception) -> Exception:
    """Return an error of this package as it is, and any other by its name and words: not all can be
    sent.
    """
    if isinstance(error, (CkptgateError, MemoryError)):
        return error
    result = RuntimeError("".join(traceback.format_exception_only(error)).strip())
    result.add_note("".join(traceback.format_exception(error)))
    return result
