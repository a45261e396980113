# SPDX-License-Identifier: Apache-2.0
"""Run a plan: a work folder beside OUT, shards under temporary names, and the final name as the last step."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exporter.plan import Plan
from exporter.stream.shards import SHARD_BYTES, ScaleRange, Task, tasks, write_shard
from verifier.errors import UsageError

STATE = "ckptgate-work.json"


@dataclass
class Written:
    """What was written: digest and size by file, and the scale range by algorithm."""

    digests: dict[str, tuple[str, int]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    resumed: int = 0


def check_out(out: Path, *, overwrite: bool, inputs: tuple[str, ...]) -> None:
    """Refuse an OUT that exists (without ``overwrite``), that is or holds an input, or that is no checkpoint folder.

    Raises:
        UsageError: OUT cannot be used.
    """
    target = out.resolve()
    for given in inputs:
        if "://" not in given:
            path = Path(given).resolve()
            if path == target or path.is_relative_to(target):
                raise UsageError(f"{out}: is the folder of an input")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: its parent folder {out.parent} does not exist")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError(f"{out}: exists; --overwrite swaps it whole")
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out}: exists and is no folder")
    if any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise UsageError(f"{out}: exists and is no checkpoint; it is not overwritten")


def work_folder(out: Path) -> Path:
    """Return the work folder of an output, beside it."""
    return out.with_name(f".{out.name}.ckptgate-work")


@contextmanager
def working(out: Path, fingerprint: str) -> Iterator[Path]:
    """Hold the work folder of ``out``: kept from an interrupted run of the same plan, else fresh.

    Raises:
        UsageError: another export to the same OUT is running.
    """
    folder = work_folder(out)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:  # released when the process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{out}: another export to it is running") from error
        if _state(folder).get("plan") != fingerprint:
            for entry in folder.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _save_state(folder, {"plan": fingerprint, "shards": {}})
        yield folder
    finally:
        os.close(lock)


def _state(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _save_state(folder: Path, state: dict[str, object]) -> None:
    temporary = folder / f"{STATE}.part"
    temporary.write_text(json.dumps(state))
    temporary.rename(folder / STATE)


def write(
    plan: Plan, folder: Path, *, workers: int, progress: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> Written:
    """Write every shard of the plan into the work folder; finished ones of an earlier run are verified and kept.

    Args:
        plan: what to write.
        folder: the work folder, held by `working`.
        workers: shards at a time; each works with one intra-op thread.
        progress: called with the bytes of each finished action.
        shard_bytes: the size at which a new shard begins.
    """
    result = Written()
    state = _state(folder)
    kept = state.get("shards")
    finished: dict[str, list[Any]] = kept if isinstance(kept, dict) else {}
    todo: list[Task] = []
    for task in tasks(plan, shard_bytes):
        if _intact(folder / task.file, finished.get(task.file)):
            entry = finished[task.file]
            result.digests[task.file] = (entry[0], entry[1])
            _widen(result, [ScaleRange(*r) for r in entry[2]])
            result.resumed += 1
            progress(sum(s.nbytes for s in task.specs))
        else:
            todo.append(task)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            futures = {pool.submit(write_shard, t, plan, folder, progress): t for t in todo}
            try:
                while futures:
                    done, _ = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        task = futures.pop(future)
                        digest, size, ranges = future.result()
                        result.digests[task.file] = (digest, size)
                        _widen(result, ranges)
                        finished[task.file] = [digest, size, [[a, *r] for a, r in _by_algo(ranges).items()]]
                        _save_state(folder, {**state, "shards": finished})
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    finally:
        torch.set_num_threads(before)
    return result


def _by_algo(ranges: list[ScaleRange]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for r in ranges:
        low, high = found.get(r.algo, (r.low, r.high))
        found[r.algo] = (min(low, r.low), max(high, r.high))
    return found


def _widen(result: Written, ranges: list[ScaleRange]) -> None:
    for algo, (low, high) in _by_algo(ranges).items():
        old = result.ranges.get(algo, (low, high))
        result.ranges[algo] = (min(old[0], low), max(old[1], high))


def _intact(path: Path, entry: list[Any] | None) -> bool:
    if not entry or not path.is_file() or path.stat().st_size != entry[1]:
        return False
    with path.open("rb") as handle:
        return bool(hashlib.file_digest(handle, "sha256").hexdigest() == entry[0])


def finish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Give the work folder its final name, in place of an old OUT where ``overwrite``."""
    (folder / STATE).unlink()
    (folder / ".lock").unlink()
    for entry in folder.iterdir():
        _sync(entry)
    _sync(folder)
    old = out.with_name(f".{out.name}.ckptgate-old")
    if overwrite and os.path.lexists(out):
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    folder.rename(out)
    _sync(out.parent)
    if old.exists() and overwrite:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
