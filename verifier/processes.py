# SPDX-License-Identifier: Apache-2.0
"""One pool of child processes for two kinds of work.

`forked` shares reading and checking among copies of this process: a copy (fork) has everything that
was computed so far, is sent only numbers, and sends back results. `spawned` gives each task a fresh
process. Both also send parts as they come.

Both re-raise what a child raised, report a child that died, and leave no child behind, whether the
caller finishes, stops early, is interrupted or is killed.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from verifier.errors import CkptgateError, MachineError

Task = TypeVar("Task")
Part = TypeVar("Part")
Result = TypeVar("Result")
_STOP_SECONDS = 5.0
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def can_fork() -> bool:
    """Whether `forked` works here: on Linux, without other Python threads, in a process that may
    have children.
    """
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and not multiprocessing.current_process().daemon
    )


def _ignore(_number: int, _part: object) -> None:
    """Do nothing: no parts are expected."""


def forked(
    work: Callable[[int, Callable[[Part], None]], Result],
    order: Sequence[int],
    workers: int,
    on_part: Callable[[int, Part], None] = _ignore,
) -> Iterator[tuple[int, Result]]:
    """Yield (number, ``work(number, send)``) for each number, as results come.

    Args:
        work: runs in a copy of this process; what it sends and its result are pickled, its side
            effects are lost.
        order: the numbers to work on, started in this order.
        workers: the number of copies, at most one per number.
        on_part: called here with (number, part) for each part that ``work`` sends.

    Raises:
        MachineError: a copy died.
        Exception: what ``work`` raised.
    """
    died = "a process that reads bytes died ({how}); --workers 1 reads in this process alone"
    pool = _Pool("fork", work, died, on_part)
    # Pages are shared until they are written to: no collection, in any copy, may write to what
    # exists now.
    gc.freeze()
    try:
        yield from pool.run([(number, number) for number in order], workers, reuse=True)
    finally:
        gc.unfreeze()


def spawned(
    work: Callable[[Task, Callable[[Part], None]], Result],
    tasks: Sequence[Task],
    workers: int,
    on_part: Callable[[int, Part], None],
    died: str,
) -> list[Result]:
    """Call ``work(task, send)`` for each task, and return the results in the order of the tasks.

    Args:
        work: a function at the top of a module; it runs in a fresh process per task. What it sends,
            and its result, are pickled.
        tasks: started in this order, ``workers`` at a time.
        workers: the number of processes at a time.
        on_part: called here with (task number, part) for each part that ``work`` sends.
        died: the message for a process that died; ``{how}`` is its signal or exit code.

    Raises:
        MachineError: a process died.
        Exception: what ``work`` raised.
    """
    pool = _Pool("spawn", work, died, on_part)
    results = dict(pool.run(list(enumerate(tasks)), workers, reuse=False))
    return [results[number] for number in range(len(tasks))]


class _Pool:
    """Children that are sent one numbered task at a time through a pipe."""

    def __init__(
        self,
        method: str,
        work: Callable[[Any, Callable[[Any], None]], Any],
        died: str,
        on_part: Callable[[int, Any], None],
    ) -> None:
        self._context: Any = multiprocessing.get_context(method)
        self._work, self._died, self._on_part = work, died, on_part
        self._children: dict[Any, Any] = {}

    def run(
        self, tasks: Iterable[tuple[int, Any]], workers: int, *, reuse: bool
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) as results come; ``reuse`` keeps a child for further tasks."""
        waiting = deque(tasks)
        try:
            for connection in [self._start() for _ in range(min(workers, len(waiting)))]:
                self._send(connection, waiting.popleft())
            while self._children:
                for connection in wait(list(self._children)):
                    kind, number, value = self._receive(connection)
                    if kind == "error":
                        raise value
                    if kind == "part":
                        self._on_part(number, value)
                        continue
                    if not (reuse and waiting):
                        self._retire(connection)
                    if waiting:
                        self._send(connection if reuse else self._start(), waiting.popleft())
                    yield number, value
        finally:
            for process in self._children.values():
                process.kill()  # it holds nothing that another process would miss
            for process in self._children.values():
                process.join(_STOP_SECONDS)

    def _start(self) -> Any:
        mine, its = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._work, its, self._inherited(mine)), daemon=True
        )
        # A signal that arrives now waits until no child can take it with this process's handlers.
        with _signals_blocked(), warnings.catch_warnings():
            # numpy's own threads wait in C; Python 3.12 counts them and warns of forking.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
            self._children[mine] = process
        its.close()
        return mine

    def _inherited(self, mine: Any) -> list[Any]:
        """Return the pipe ends that a fork copies into the child along with its own."""
        forks = self._context.get_start_method() == "fork"
        return [*self._children, mine] if forks else []

    def _send(self, connection: Any, task: tuple[int, Any]) -> None:
        try:
            connection.send(task)
        except OSError:
            raise self._death(connection) from None

    def _receive(self, connection: Any) -> tuple[str, int, Any]:
        try:
            kind, number, value = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        return kind, number, value

    def _retire(self, connection: Any) -> None:
        connection.close()
        self._children.pop(connection).join(_STOP_SECONDS)

    def _death(self, connection: Any) -> MachineError:
        process = self._children[connection]
        process.join(_STOP_SECONDS)
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return MachineError(self._died.format(how=how))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    work: Callable[[Any, Callable[[Any], None]], Any],
    connection: Connection,
    inherited: Sequence[Connection],
) -> None:
    # The terminal sends Ctrl-C to the whole group: the parent decides what happens to its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Open here too, they would keep a child waiting for a parent that was killed.
    for end in inherited:
        end.close()
    while True:
        try:
            number, task = connection.recv()
        except (EOFError, OSError):
            return  # no more tasks, or the parent was killed
        try:
            connection.send(_answer(work, number, task, connection))
        except BrokenPipeError:
            return  # the parent was killed


def _answer(
    work: Callable[[Any, Callable[[Any], None]], Any],
    number: int,
    task: Any,
    connection: Connection,
) -> tuple[str, int, Any]:
    try:
        result = work(task, lambda part: connection.send(("part", number, part)))
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  (re-raised in the parent)
        return "error", number, _portable(error)
    return "result", number, result


def _portable(error: Exception) -> Exception:
    """Return an error of this package as it is, and any other as text: not every error can be
    pickled.
    """
    if isinstance(error, (CkptgateError, MemoryError)):
        return error
    result = RuntimeError("".join(traceback.format_exception_only(error)).strip())
    result.add_note("".join(traceback.format_exception(error)))
    return result
