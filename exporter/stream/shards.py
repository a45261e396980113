# SPDX-License-Identifier: Apache-2.0
"""Distribute a plan over shards and write each: independent, idempotent, a few tensors in
memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from exporter import codecs, weights
from exporter.plan import Action, Constant, Copy, Decode, Encode, Plan, Restack, Spec, Take
from exporter.stream.load import Buffers, load, load_parts, naming, region
from exporter.stream.stacks import write_restack
from exporter.stream.summary import EncodeSummary, scale_range
from verifier.checkpoint import DTYPE_BITS, MAX_HEADER, Checkpoint, Tensor
from verifier.errors import EncodeError

SHARD_BYTES = 5_000_000_000
SHARD_TENSORS = 200_000
COPY_BYTES = 16 << 20
PART_BYTES = 8 << 20
"""Bytes of a shard from which on its next actions are work of their own."""
SMALL_BYTES = 1 << 16
"""Fewer are digested faster than handed to another thread."""
_BUFFERS = Buffers()


class StoppedError(Exception):
    """A shard was abandoned between two actions because the export ends; never leaves this
    package.
    """


@dataclass(frozen=True)
class Task:
    """One output shard: its file name and actions."""

    file: str
    actions: tuple[Action, ...]

    @property
    def specs(self) -> list[Spec]:
        """Its tensors in file order: widest elements first, so that every tensor is aligned to its
        own dtype.
        """
        specs = [s for a in self.actions for s in a.specs]
        return sorted(specs, key=lambda s: (-DTYPE_BITS[s.dtype], s.name))


def tasks(plan: Plan, shard_bytes: int = SHARD_BYTES) -> list[Task]:
    """Return the shards of a plan, at most ``shard_bytes`` each unless one action alone is
    larger.
    """
    groups: list[list[Action]] = [[]]
    size = count = 0
    for action in plan.actions:
        nbytes, n = sum(s.nbytes for s in action.specs), len(action.specs)
        if groups[-1] and (size + nbytes > shard_bytes or count + n > SHARD_TENSORS):
            groups.append([])
            size = count = 0
        groups[-1].append(action)
        size, count = size + nbytes, count + n
    total = len(groups)
    return [
        Task(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)
    ]


def header(specs: list[Spec]) -> bytes:
    """Return the safetensors header of a shard, padded to eight bytes.

    Raises:
        EncodeError: the header would be larger than readers accept.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for s in specs:
        entries[s.name] = {
            "dtype": s.dtype,
            "shape": list(s.shape),
            "data_offsets": [offset, offset + s.nbytes],
        }
        offset += s.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise EncodeError(
            f"a shard header has {len(raw):,} bytes; readers accept at most {MAX_HEADER:,}"
        )
    return len(raw).to_bytes(8, "little") + raw


def write_shard(
    task: Task,
    plan: Plan,
    folder: Path,
    progress: Callable[[int], None],
    stop: threading.Event,
    pool: Executor,
) -> tuple[str, int, list[EncodeSummary]]:
    """Write one shard under a temporary name, sync and rename it; return its digest, its size in
    bytes, and what was encoded.

    Args:
        task: the shard.
        plan: its plan.
        folder: where the file goes.
        progress: called with the bytes of each finished action, in threads of the pool.
        stop: set when no further action may begin.
        pool: does the actions; this thread only waits for them, and makes the digest.

    Raises:
        EncodeError: a weight that cannot be encoded, by name.
        StoppedError: ``stop`` was set before the last action.
        OSError: the disk.
    """
    specs = task.specs
    head = header(specs)
    offsets, end = {}, len(head)
    for s in specs:
        offsets[s.name] = end
        end += s.nbytes
    temporary = folder / f"{task.file}.part"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _put(fd, head, 0)
        os.ftruncate(fd, end)
        _announce(task, plan)
        encoded: list[EncodeSummary] = []
        copied = _copied(task.actions, plan)
        if len(copied) == len(task.actions):
            copier = _Copier(plan, fd, pool, hashlib.sha256(head))
            for action in sorted(copied, key=lambda a: offsets[a.specs[0].name]):
                _require_running(stop)
                copier.copy(action, offsets[action.specs[0].name])
                progress(action.specs[0].nbytes)
            digest = copier.digest()
            os.fsync(fd)
        else:
            work = _Work(_ShardWriter(plan, fd, offsets), progress, stop)
            encoded = work.run(task.actions, pool)
            synced = pool.submit(os.fsync, fd)
            digest = digest_of(fd, stop)
            synced.result()
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    os.close(fd)
    temporary.rename(folder / task.file)
    return digest, end, encoded


def _require_running(*stops: threading.Event) -> None:
    if any(stop.is_set() for stop in stops):
        raise StoppedError


def _copied(actions: Sequence[Action], plan: Plan) -> list[Copy | Take]:
    """Return the actions that copy a tensor as it is from a file of this machine; others are read
    in the order in which they are announced.
    """
    whole = [a for a in actions if isinstance(a, Copy) or (isinstance(a, Take) and a.whole)]
    return [a for a in whole if not plan.origin(a.origin).source.remote]


class _Copier:
    """Copies whole tensors in the order of their shard, whose digest is made on the way: a piece is
    digested in the pool while it is written and the next one is read.
    """

    def __init__(self, plan: Plan, fd: int, pool: Executor, state: Any) -> None:
        self._plan, self._fd, self._pool, self._state = plan, fd, pool, state
        self._free, self._other = (np.empty(COPY_BYTES, np.uint8) for _ in range(2))
        self._digested: Future[None] | None = None

    def copy(self, action: Copy | Take, offset: int) -> None:
        """Copy the tensor of a `Copy`, or of a `Take` of all of it, to a byte of the shard."""
        source, tensor = self._plan.origin(action.origin).source, action.tensor
        for start in range(0, tensor.nbytes, COPY_BYTES):
            piece = self._free[: min(COPY_BYTES, tensor.nbytes - start)]
            source.read_into(tensor.file, tensor.offset + start, piece)
            self._wait()
            if piece.size >= SMALL_BYTES:
                self._digested = self._pool.submit(self._state.update, piece.data)
                self._free, self._other = self._other, self._free
            else:
                self._state.update(piece.data)
            _put(self._fd, piece.data, offset + start)

    def digest(self) -> str:
        """Return the SHA-256 of the header and all tensors."""
        self._wait()
        digest: str = self._state.hexdigest()
        return digest

    def _wait(self) -> None:
        """Wait until the last piece is digested: its buffer is read into next."""
        if self._digested is not None:
            self._digested.result()
            self._digested = None


class _Work:
    """The actions of an open shard, shared among the threads of a pool."""

    def __init__(
        self, writer: _ShardWriter, progress: Callable[[int], None], stop: threading.Event
    ) -> None:
        self._writer, self._progress, self._stop = writer, progress, stop
        self._failed = threading.Event()

    def run(self, actions: Sequence[Action], pool: Executor) -> list[EncodeSummary]:
        """Do all actions and return what was encoded, in their order."""
        futures = [pool.submit(self._do, part) for part in _parts(actions)]
        try:
            return [summary for future in futures for summary in future.result()]
        except BaseException:
            self._failed.set()
            raise
        finally:
            wait(futures)  # the file is closed next

    def _do(self, actions: Sequence[Action]) -> list[EncodeSummary]:
        encoded: list[EncodeSummary] = []
        for action in actions:
            _require_running(self._stop, self._failed)
            try:
                encoded += self._writer.write(action)
            finally:
                _BUFFERS.release()
            self._progress(sum(s.nbytes for s in action.specs))
        return encoded


def _parts(actions: Sequence[Action]) -> Iterator[Sequence[Action]]:
    """Yield consecutive actions of `PART_BYTES` and more together."""
    start = size = 0
    for i, action in enumerate(actions, 1):
        size += sum(s.nbytes for s in action.specs)
        if size >= PART_BYTES or i == len(actions):
            yield actions[start:i]
            start, size = i, 0


def _announce(task: Task, plan: Plan) -> None:
    """Announce to remote sources the tensors that a shard reads whole, in the order of reading."""
    announced: dict[int, list[Tensor]] = {}
    origins: dict[int, Checkpoint] = {}
    for action in task.actions:
        origin, tensors = _whole_reads(action, plan)
        origins[id(origin)] = origin
        announced.setdefault(id(origin), []).extend(tensors)
    for key, origin in origins.items():
        origin.expect(announced[key])


def _whole_reads(action: Action, plan: Plan) -> tuple[Checkpoint, list[Tensor]]:
    """Return the tensors that an action reads whole, and where from."""
    if isinstance(action, Encode):
        return plan.source, [t for weight in action.weights for t in weight.parts.values()]
    if isinstance(action, Decode):
        return plan.origin(action.origin), list(action.weight.parts.values())
    if isinstance(action, Copy) or (isinstance(action, Take) and action.whole):
        return plan.origin(action.origin), [action.tensor]
    return plan.source, []


class _ShardWriter:
    """Writes actions into an open shard; ``offsets`` says where each tensor begins."""

    def __init__(self, plan: Plan, fd: int, offsets: dict[str, int]) -> None:
        self._plan, self._fd, self._offsets = plan, fd, offsets

    def write(self, action: Action) -> list[EncodeSummary]:
        """Write one action, and return what was encoded."""
        if isinstance(action, Encode):
            return [self._encode(action)]
        if isinstance(action, Restack):
            return write_restack(action, self._plan.source, self._put_tensor)
        if isinstance(action, Constant):
            self._put_tensor(action.name, torch.tensor(action.value))
        elif isinstance(action, Decode):
            values = load(self._plan.origin(action.origin), action.weight, _BUFFERS)
            self._put_tensor(action.name, values.to(torch.bfloat16))
        elif isinstance(action, Take) and not action.whole:
            raw = region(self._plan.origin(action.origin), action)
            _put(self._fd, raw.reshape(-1).view(np.uint8).data, self._offsets[action.name])
        else:
            self._copy(action)
        return []

    def _put_tensor(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        _put(self._fd, raw.data, self._offsets[name] + start)

    def _copy(self, action: Copy | Take) -> None:
        (spec,) = action.specs
        source, tensor = self._plan.origin(action.origin).source, action.tensor
        buffer = _BUFFERS.take(min(COPY_BYTES, tensor.nbytes))
        for start in range(0, tensor.nbytes, COPY_BYTES):
            length = min(COPY_BYTES, tensor.nbytes - start)
            raw = buffer[:length]
            source.read_into(tensor.file, tensor.offset + start, raw)
            _put(self._fd, raw.data, self._offsets[spec.name] + start)

    def _encode(self, action: Encode) -> EncodeSummary:
        low, high = float("inf"), 0.0
        modules, blocks, changed = self._encoded(action)
        for i, (module, parts) in enumerate(zip(action.modules, modules, strict=True)):
            values = {
                f"{module}.{action.scale_leaf if leaf == 'weight_scale' else leaf}": value
                for leaf, value in parts.items()
            }
            if action.input_scales is not None:
                values[f"{module}.input_scale"] = torch.tensor(action.input_scales[i])
            for spec in action.specs_of(i):
                self._put_tensor(spec.name, values[spec.name])
            module_low, module_high = scale_range(parts)
            low, high = min(low, module_low), max(high, module_high)
        return EncodeSummary(action.format.algo, len(action.modules), low, high, blocks, changed)

    def _encoded(self, action: Encode) -> tuple[list[codecs.Parts], int, int]:
        """Return the tensors of each module of a group; of MXFP4 sources the blocks of 16 and those
        that changed.
        """
        source = self._plan.source
        if action.method == "exact":
            with naming(action.weights[0].name):
                return weights.exact([load_parts(source, w, _BUFFERS) for w in action.weights])
        values = [load(source, w, _BUFFERS) for w in action.weights]
        shared = _shared_amax(action, values)
        method = cast(weights.Method, action.method)
        encoded = []
        for weight, value in zip(action.weights, values, strict=True):
            with naming(weight.name):
                encoded.append(
                    weights.encode(value, action.format.name, method=method, amax=shared)
                )
        return encoded, 0, 0


def _shared_amax(action: Encode, values: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the maximum that a fused group shares, None for a format without a global scale."""
    if not action.format.packed:
        return None
    maxima: list[torch.Tensor] = []
    for weight, value in zip(action.weights, values, strict=True):
        with naming(weight.name):
            maxima.append(codecs.amax(value, action.format.name))
    return torch.stack(maxima).amax()


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def digest_of(fd: int, stop: threading.Event) -> str:
    """Return the SHA-256 of an open file.

    Raises:
        StoppedError: ``stop`` was set meanwhile.
        OSError: the disk.
    """
    state, buffer, offset = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
    while count := os.preadv(fd, [buffer], offset):
        _require_running(stop)
        state.update(buffer[:count])
        offset += count
    return state.hexdigest()
