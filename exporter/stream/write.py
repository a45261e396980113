# SPDX-License-Identifier: Apache-2.0
"""Run a plan: a work directory next to OUT, shards under temporary names, and the final name as the
last step.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from exporter.out import out_exists, work_folder
from exporter.plan import Plan
from exporter.stream.shards import Task, write_shard
from exporter.stream.summary import EncodeSummary, combine
from verifier.checkpoint import Checkpoint
from verifier.errors import UsageError

STATE = "ckptgate-work.json"
LOCK = ".lock"


@dataclass
class Written:
    """What was written: SHA-256 and size in bytes by file, what was encoded by algorithm, and how
    many shards an earlier run had finished.
    """

    digests: dict[str, tuple[str, int]] = field(default_factory=dict)
    encoded: dict[str, EncodeSummary] = field(default_factory=dict)
    resumed: int = 0


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
    """Lock the work directory of ``out``: that of an interrupted run of the same plan, else an
    empty one.

    Raises:
        UsageError: another export to the same OUT is running, or has just finished.
    """
    folder = work_folder(out)
    lock = _lock(folder, out)
    try:
        if not overwrite and os.path.lexists(out):  # another export finished since `check_out`
            if not (folder / STATE).exists():  # made above; one with a state can be resumed
                _clear(folder)
                folder.rmdir()
            raise out_exists(out)
        if _state(folder).get("plan") != fingerprint:
            _clear(folder, keep={LOCK})
            _save_state(folder, {"plan": fingerprint, "shards": {}})
        yield folder
    finally:
        os.close(lock)


def _lock(folder: Path, out: Path) -> int:
    """Make the work directory and return its lock; it is released when the process ends, however it
    ends.
    """
    busy = UsageError(f"{out}: another export is writing it")
    folder.mkdir(exist_ok=True)
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError as error:  # the directory has just become OUT
        raise busy from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
            raise FileNotFoundError(folder)
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(lock)
        raise busy from error
    return lock


def _clear(folder: Path, keep: Collection[str] = ()) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _state(folder: Path) -> dict[str, object]:
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
        folder: the work directory, locked by `working` under their fingerprint.
        workers: shards at a time; each works with one intra-op thread.
        progress: called with the bytes of each finished action.
    """
    run = _Run(folder)
    remaining = [t for t in todo if not run.resume(t, progress)]
    _clear(folder, keep={LOCK, STATE, *run.finished})
    stop = threading.Event()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                running = {pool.submit(run.write, t, plan, progress, stop) for t in remaining}
                while running:
                    done, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:  # a signal can come at any point above, even inside `submit`
                stop.set()
                raise
    finally:
        torch.set_num_threads(before)
    return run.result


class _Run:
    """The finished shards of an export, in memory and in the state file of its directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = Written()
        self.finished: dict[str, list[Any]] = {}
        self._lock = threading.Lock()
        self._state = _state(folder)
        earlier = self._state.get("shards")
        self._earlier: dict[str, list[Any]] = earlier if isinstance(earlier, dict) else {}

    def resume(self, task: Task, progress: Callable[[int], None]) -> bool:
        """Take over a shard that an earlier run finished; False where there is none, or it was
        damaged.
        """
        entry = self._earlier.get(task.file)
        if not entry or not _intact(self.folder / task.file, entry):
            return False
        digest, size, summaries = entry
        try:
            encoded = [EncodeSummary(**fields) for fields in summaries]
        except TypeError:  # another version of ckptgate wrote it
            return False
        self.finished[task.file] = entry
        self.result.digests[task.file] = (digest, size)
        self.result.encoded = combine([*self.result.encoded.values(), *encoded])
        self.result.resumed += 1
        progress(sum(s.nbytes for s in task.specs))
        return True

    def write(
        self, task: Task, plan: Plan, progress: Callable[[int], None], stop: threading.Event
    ) -> None:
        """Write a shard and record it, in a worker: no signal comes between the two there."""
        digest, size, encoded = write_shard(task, plan, self.folder, progress, stop)
        summaries = [asdict(summary) for summary in combine(encoded).values()]
        with self._lock:
            self.result.digests[task.file] = (digest, size)
            self.result.encoded = combine([*self.result.encoded.values(), *encoded])
            self.finished[task.file] = [digest, size, summaries]
            _save_state(self.folder, {**self._state, "shards": self.finished})


def _intact(path: Path, entry: list[Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry[1]:
        return False
    with path.open("rb") as handle:
        return bool(hashlib.file_digest(handle, "sha256").hexdigest() == entry[0])


def finish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Rename the work directory to its final name; with ``overwrite``, in place of an old OUT.

    The lock of `working` guards the directory until it has its name; its file is removed last.

    Raises:
        UsageError: OUT was made meanwhile; the work directory stays.
    """
    for entry in folder.iterdir():
        _sync(entry)
    _sync(folder)
    old = out.with_name(f".{out.name}.ckptgate-old")
    if overwrite and os.path.lexists(out):
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    if os.path.lexists(out):
        raise out_exists(out)
    (folder / STATE).unlink()
    folder.rename(out)
    (out / LOCK).unlink(missing_ok=True)
    _sync(out)
    _sync(out.parent)
    if old.exists() and overwrite:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
