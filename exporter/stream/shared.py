# SPDX-License-Identifier: Apache-2.0
"""Shards of one plan, written by several processes and machines into one work directory.

Each shard has a completion record next to the state. All writers hold the lock together; one of
them holds it alone to put the result together.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter.out import out_exists, work_folder
from exporter.plan import Plan
from exporter.stream.shards import Task, write_shard
from exporter.stream.write import (
    RECORDS,
    RESULT,
    holds,
    lock,
    record,
    records_of,
    state_of,
    working,
    write_all,
)
from exporter.stream.write import (
    fingerprint as fingerprint_of,
)
from verifier.errors import UsageError
from verifier.files import write_atomic

_TRIES = 50
_TRY_SECONDS = 0.2


@dataclass(frozen=True)
class Writers:
    """One of the processes that write a plan; it has made the work directory or joined it."""

    plan: Plan
    todo: Sequence[Task]
    folder: Path
    lock: int
    fingerprint: str

    def left(self) -> list[Task]:
        """Return the shards without a completion record."""
        recorded = records_of(self.folder)
        return [task for task in self.todo if task.file not in recorded]

    def write(self, files: Sequence[str], *, workers: int, progress: Callable[[int], None]) -> None:
        """Write some shards, each under a name of its own first, and record it.

        Raises:
            EncodeError: a weight that cannot be encoded, by name.
            MachineError: a source changed while it was read.
            OSError: the disk.
        """
        sources = [c for c in (self.plan.source, self.plan.onto) if c is not None]
        versions = [(source, source.versions()) for source in sources]
        mine = [task for task in self.left() if task.file in set(files)]
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="writer-") as name:

            def write_one(task: Task, stop: threading.Event, pool: Executor) -> None:
                digest, nbytes, encoded = write_shard(
                    task, self.plan, Path(name), progress, stop, pool
                )
                for source, before in versions:
                    source.require_unchanged(before)
                Path(name, task.file).rename(self.folder / RESULT / task.file)
                entry = json.dumps(record(digest, nbytes, encoded))
                write_atomic(self.folder / RECORDS / f"{task.file}.json", entry)

            write_all(write_one, mine, workers)

    def alone(self) -> bool:
        """Wait until no other process writes, and hold the lock alone; False where another one has
        put the result together.
        """
        fcntl.flock(self.lock, fcntl.LOCK_UN)  # two that wait for each other would never end
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        current = holds(self.lock, self.folder)
        return current and state_of(self.folder).get("plan") == self.fingerprint


@contextmanager
def sharing(plan: Plan, todo: list[Task], out: Path) -> Iterator[Writers]:
    """Join those who write a plan, or be the first.

    Raises:
        UsageError: OUT exists, or another plan is written into it.
    """
    folder, fingerprint = work_folder(out), fingerprint_of(plan, todo)
    fd = _joined(folder, out, fingerprint)
    try:
        (folder / RECORDS).mkdir(exist_ok=True)
        yield Writers(plan, todo, folder, fd, fingerprint)
    finally:
        os.close(fd)


def _joined(folder: Path, out: Path, fingerprint: str) -> int:
    """Return the lock that all writers of a plan hold together."""
    for _ in range(_TRIES):
        if os.path.lexists(out):
            raise out_exists(out)
        with suppress(UsageError):  # held alone: for a moment, by one that makes the directory
            fd = lock(folder, out, fcntl.LOCK_SH)
            if state_of(folder).get("plan") == fingerprint:
                return fd
            os.close(fd)
            with working(out, fingerprint, overwrite=False):
                pass
        time.sleep(_TRY_SECONDS)
    raise UsageError(f"{out}: another export is writing it")
