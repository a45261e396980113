# SPDX-License-Identifier: Apache-2.0
"""Run a plan: a work directory next to OUT, shards under temporary names, and the final name as the
last step.

The work directory holds the checkpoint in `RESULT`, and next to it the lock and the state: the
checkpoint gets its name in one step, and takes nothing with it that does not belong to it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter.out import out_exists, work_folder
from exporter.plan import Plan
from exporter.stream.shards import Task, digest_of, write_shard
from exporter.stream.signals import signals_held
from exporter.stream.summary import EncodeSummary, combine
from verifier.checkpoint import Checkpoint
from verifier.errors import MachineError, UsageError
from verifier.text import size

STATE = "state.json"
LOCK = "lock"
OPEN = 2
"""Shards that are written at a time."""
RESULT = "checkpoint"
RECORDS = "records"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of Linux's renameat2(2)."""


@dataclass
class Written:
    """What was written: SHA-256 and size in bytes by file, and what was encoded by algorithm."""

    digests: dict[str, tuple[str, int]] = field(default_factory=dict)
    encoded: dict[str, EncodeSummary] = field(default_factory=dict)


def fingerprint(plan: Plan, todo: list[Task]) -> str:
    """Return a digest of what decides the bytes of every shard file: the plan, the files of its
    inputs, and the tensors of each shard.
    """
    parts: list[object] = [plan.fingerprint(), [[t.file, [s.name for s in t.specs]] for t in todo]]
    parts += [_identity(c) for c in (plan.source, plan.onto) if c is not None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _identity(ckpt: Checkpoint) -> list[tuple[str | int, ...]]:
    """Return what changes when a shard is re-written with the same header."""
    return [(s.file, s.size, *ckpt.source.version(s.file)) for s in ckpt.shards]


@contextmanager
def working(out: Path, fingerprint: str, *, overwrite: bool) -> Iterator[Path]:
    """Lock the work directory of ``out`` and yield the directory of its result: that of an
    interrupted run of the same plan, else an empty one.

    Raises:
        UsageError: another export to the same OUT is running, or has just finished.
    """
    folder = work_folder(out)
    result = folder / RESULT
    fd = lock(folder, out)
    try:
        if not overwrite and os.path.lexists(out):  # another export finished since `check_out`
            if not result.exists():  # made above, or all that is left of that export
                shutil.rmtree(folder)
            raise out_exists(out)
        if state_of(folder).get("plan") != fingerprint:
            _clear(folder, keep={LOCK})
            _save_state(folder, {"plan": fingerprint, "shards": {}})
        result.mkdir(exist_ok=True)
        yield result
    finally:
        os.close(fd)


def lock(folder: Path, out: Path, kind: int = fcntl.LOCK_EX) -> int:
    """Make the work directory and return its lock; it is released when the process ends, however it
    ends.

    Raises:
        UsageError: another export holds it.
    """
    busy = UsageError(f"{out}: another export is writing it")
    folder.mkdir(exist_ok=True)
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError as error:  # the export that made it has just finished
        raise busy from error
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        if not holds(fd, folder):
            raise FileNotFoundError(folder)
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise busy from error
    return fd


def holds(fd: int, folder: Path) -> bool:
    """Whether a lock is that of the work directory that exists now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _clear(folder: Path, keep: Collection[str] = ()) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def state_of(folder: Path) -> dict[str, object]:
    """Return the state of a work directory; nothing where it has none."""
    try:
        value = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _save_state(folder: Path, state: dict[str, object]) -> None:
    temporary = folder / f"{STATE}.part"
    try:
        temporary.write_text(json.dumps(state))
        temporary.rename(folder / STATE)
    except BaseException:  # a signal may come between the two
        temporary.unlink(missing_ok=True)
        raise


def write(
    plan: Plan, todo: list[Task], folder: Path, *, workers: int, progress: Callable[[int], None]
) -> Written:
    """Write every shard of the plan into the work directory; finished shards of an earlier run are
    verified and kept.

    Everything else that an earlier run left in the directory is removed. When an error or a signal
    ends the run, shards stop between two actions, and those that were finished are recorded.

    Args:
        plan: what to write.
        todo: its shards.
        folder: what `working` yields for their fingerprint.
        workers: threads that encode and copy, each with one intra-op thread. They take the actions
            of one shard after the other; while one is synced and its digest made, they work on the
            next.
        progress: called with the bytes of each finished action.

    Raises:
        MachineError: the disk has no room for the shards.
    """
    run = _Run(folder)
    remaining = run.resume(todo, workers, progress)
    _clear(folder, keep=run.finished)
    _require_space(folder, sum(spec.nbytes for task in remaining for spec in task.specs))
    write_all(partial(run.write, plan, progress), remaining, workers)
    return run.result


def write_all(
    write_one: Callable[[Task, threading.Event, Executor], None], todo: Sequence[Task], workers: int
) -> None:
    """Write shards in threads; when one fails, or a signal comes, the others stop between two
    actions.

    Args:
        write_one: calls `write_shard`; it gets a shard, and what `write_shard` takes as ``stop``
            and ``pool``.
        todo: the shards.
        workers: threads of the pool.
    """
    stop = threading.Event()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            signals_held() as act,
            ThreadPoolExecutor(max(1, workers)) as pool,
            ThreadPoolExecutor(OPEN) as shards,
        ):
            try:
                running = {shards.submit(write_one, task, stop, pool) for task in todo}
                while running:
                    act()
                    done, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:
                stop.set()
                raise
    finally:
        torch.set_num_threads(before)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder.parent.parent}: {size(needed)} are to be written and {size(free)} are free; "
            "free some space and run the same command again: it keeps finished shards"
        )


class _Run:
    """The finished shards of an export, in memory and in the state file of its work directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = Written()
        self.finished: dict[str, list[Any]] = {}
        self._lock = threading.Lock()
        self._state = state_of(folder.parent)
        earlier = self._state.get("shards")
        self._earlier: dict[str, list[Any]] = earlier if isinstance(earlier, dict) else {}
        self._earlier |= records_of(folder.parent)

    def resume(
        self, todo: Sequence[Task], workers: int, progress: Callable[[int], None]
    ) -> list[Task]:
        """Take over the shards that an earlier run finished, and return the others: those that it
        did not, and those that were damaged. Digests are made in threads.
        """
        stop = threading.Event()

        def intact(task: Task) -> bool:
            return _intact(self.folder / task.file, self._earlier.get(task.file), stop)

        left = []
        with signals_held() as act, ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                for task, future in [(task, pool.submit(intact, task)) for task in todo]:
                    act()
                    while wait([future], timeout=0.2).not_done:
                        act()
                    if not (future.result() and self._take(task, progress)):
                        left.append(task)
            except BaseException:
                stop.set()
                raise
        return left

    def _take(self, task: Task, progress: Callable[[int], None]) -> bool:
        digest, nbytes, summaries = entry = self._earlier[task.file]
        try:
            encoded = [EncodeSummary(**fields) for fields in summaries]
        except TypeError:  # another version of ckptgate wrote it
            return False
        self.finished[task.file] = entry
        self.result.digests[task.file] = (digest, nbytes)
        self.result.encoded = combine([*self.result.encoded.values(), *encoded])
        progress(sum(s.nbytes for s in task.specs))
        return True

    def write(
        self,
        plan: Plan,
        progress: Callable[[int], None],
        task: Task,
        stop: threading.Event,
        pool: Executor,
    ) -> None:
        """Write a shard and record it, in a thread: no signal comes between the two there."""
        digest, nbytes, encoded = write_shard(task, plan, self.folder, progress, stop, pool)
        with self._lock:
            self.result.digests[task.file] = (digest, nbytes)
            self.result.encoded = combine([*self.result.encoded.values(), *encoded])
            self.finished[task.file] = record(digest, nbytes, encoded)
            _save_state(self.folder.parent, {**self._state, "shards": self.finished})


def record(digest: str, nbytes: int, encoded: list[EncodeSummary]) -> list[Any]:
    """Return the completion record of a shard: its digest, its bytes, and what was encoded."""
    return [digest, nbytes, [asdict(summary) for summary in combine(encoded).values()]]


def records_of(folder: Path) -> dict[str, list[Any]]:
    """Return the completion records of shards that several machines wrote, by shard."""
    records = {}
    for path in (folder / RECORDS).glob("*.json"):
        records[path.stem] = json.loads(path.read_bytes())
    return records


def _intact(path: Path, entry: list[Any] | None, stop: threading.Event) -> bool:
    if not entry or not path.is_file() or path.stat().st_size != entry[1]:
        return False
    try:
        with path.open("rb") as handle:
            return digest_of(handle.fileno(), stop) == str(entry[0])
    except OSError:  # a shard that cannot be read is written again
        return False


def finish(result: Path, out: Path, *, overwrite: bool) -> None:
    """Give a result its final name and remove the work directory; with ``overwrite``, in place of
    an old OUT.

    Raises:
        UsageError: OUT was made meanwhile; the work directory stays.
    """
    for entry in result.iterdir():
        _sync(entry)
    _sync(result)
    if not os.path.lexists(out):
        result.rename(out)
    elif overwrite:
        _exchange(result, out)
    else:
        raise out_exists(out)
    _sync(out.parent)
    # OUT is complete: an export that waits for the lock may make its file here at any time.
    shutil.rmtree(result.parent, ignore_errors=True)


def _exchange(result: Path, out: Path) -> None:
    """Exchange two directories in one step, or where the system cannot, in two."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = _AT_FDCWD, os.fsencode(result), _AT_FDCWD, os.fsencode(out)
    if rename is None or rename(*names, _RENAME_EXCHANGE) != 0:
        out.rename(result.with_name("replaced"))
        result.rename(out)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
