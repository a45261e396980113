# SPDX-License-Identifier: Apache-2.0
"""Distribute a plan over shards and write each: independent, idempotent, a few tensors in
memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from exporter import codecs, weights
from exporter.layout import read_region
from exporter.plan import Action, Constant, Copy, Decode, Encode, Plan, Restack, Spec, Take, Weight
from exporter.stream.stacks import write_restack
from verifier.checkpoint import DTYPE_BITS, MAX_HEADER, Checkpoint, Tensor
from verifier.errors import EncodeError

SHARD_BYTES = 5_000_000_000
SHARD_TENSORS = 200_000
COPY_BYTES = 16 << 20
_TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class StoppedError(Exception):
    """The shard was given up between two actions, because the export ends; it does not leave this
    package.
    """


@dataclass(frozen=True)
class Made:
    """What encodings to one algorithm made: linears, scale range, MXFP4 blocks.

    ``low`` and ``high`` are the smallest and largest effective scale; of ``blocks`` of 16 that were
    read from MXFP4, ``lost`` hold other values now.
    """

    algo: str
    linears: int
    low: float
    high: float
    blocks: int = 0
    lost: int = 0


def combine(made: Iterable[Made]) -> dict[str, Made]:
    """Return the sum of what was made, by algorithm."""
    found: dict[str, Made] = {}
    for m in made:
        old = found.get(m.algo)
        found[m.algo] = (
            m
            if old is None
            else Made(
                m.algo,
                old.linears + m.linears,
                min(old.low, m.low),
                max(old.high, m.high),
                old.blocks + m.blocks,
                old.lost + m.lost,
            )
        )
    return found


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
        found = [s for a in self.actions for s in a.specs]
        return sorted(found, key=lambda s: (-DTYPE_BITS[s.dtype], s.name))


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
        EncodeError: the header would exceed what readers accept.
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
            f"a shard header of {len(raw):,} bytes; at most {MAX_HEADER:,} are readable"
        )
    return len(raw).to_bytes(8, "little") + raw


def write_shard(
    task: Task, plan: Plan, folder: Path, progress: Callable[[int], None], stop: threading.Event
) -> tuple[str, int, list[Made]]:
    """Write one shard under a temporary name, sync it, give it its name; return digest, size and
    what was encoded.

    Raises:
        EncodeError: a weight that cannot be encoded, by name.
        StoppedError: ``stop`` was set before the last action.
        OSError: the disk.
    """
    specs = task.specs
    head = header(specs)
    places, offset = {}, len(head)
    for s in specs:
        places[s.name] = offset
        offset += s.nbytes
    temporary = folder / f"{task.file}.part"
    made: list[Made] = []
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _put(fd, head, 0)
        os.ftruncate(fd, offset)
        for action in task.actions:
            if stop.is_set():
                raise StoppedError
            if isinstance(action, Encode):
                made.append(_encode(action, plan, fd, places))
            elif isinstance(action, Constant):
                _put(fd, torch.tensor(action.value).numpy().tobytes(), places[action.name])
            elif isinstance(action, Decode):
                values = load(plan.origin(action.origin), action.weight)
                _put(fd, _bytes(values.to(torch.bfloat16)), places[action.name])
            elif isinstance(action, Restack):
                made += _restack(action, plan, fd, places)
            elif isinstance(action, Take):
                _take(action, plan, fd, places[action.name])
            else:
                _copy(action, plan, fd, places[action.tensor.name])
            progress(sum(s.nbytes for s in action.specs))
        os.fsync(fd)
        found = _digest(fd)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    os.close(fd)
    temporary.rename(folder / task.file)
    return found, offset, made


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _copy(action: Copy, plan: Plan, fd: int, place: int) -> None:
    source, t = plan.origin(action.origin).source, action.tensor
    for start in range(0, t.nbytes, COPY_BYTES):
        length = min(COPY_BYTES, t.nbytes - start)
        _put(fd, source.read(t.file, t.offset + start, length).data, place + start)


def _take(action: Take, plan: Plan, fd: int, place: int) -> None:
    if action.whole:
        _copy(Copy(action.tensor, action.origin), plan, fd, place)
    else:
        _put(fd, region(plan.origin(action.origin), action).reshape(-1).view(np.uint8).data, place)


def region(ckpt: Checkpoint, take: Take) -> npt.NDArray[Any]:
    """Return what a `Take` takes, contiguous, as unsigned integers of the dtype's width; no more of
    the file is read.

    Raises:
        EncodeError: a dtype whose values are no whole bytes.
    """
    return read_region(ckpt, take.tensor, take.cuts, take.order)


def _encode(action: Encode, plan: Plan, fd: int, places: dict[str, int]) -> Made:
    low, high = float("inf"), 0.0
    encoded, blocks, lost = _encoded(action, plan)
    for i, (module, parts) in enumerate(zip(action.modules, encoded, strict=True)):
        named = {
            f"{module}.{action.scale_leaf if leaf == 'weight_scale' else leaf}": value
            for leaf, value in parts.items()
        }
        if action.input_scales is not None:
            named[f"{module}.input_scale"] = torch.tensor(action.input_scales[i])
        for spec in action.specs_of(i):
            _put(fd, _bytes(named[spec.name]), places[spec.name])
        lo, hi = _scale_range(parts)
        low, high = min(low, lo), max(high, hi)
    return Made(action.format.algo, len(action.modules), low, high, blocks, lost)


def _restack(action: Restack, plan: Plan, fd: int, places: dict[str, int]) -> list[Made]:
    def put(name: str, value: torch.Tensor, at: int) -> None:
        _put(fd, _bytes(value), places[name] + at)

    low, high, blocks, lost = write_restack(action, plan, put)
    if action.format is None:
        return []
    return [Made(action.format.algo, len(action.modules), low, high, blocks, lost)]


def _encoded(action: Encode, plan: Plan) -> tuple[list[codecs.Parts], int, int]:
    """Return the tensors of each module of a group, and of MXFP4 sources the blocks and those that
    lost something.
    """
    if action.method == "exact":
        with _naming(action.weights[0]):
            return weights.exact([_parts(plan.source, w) for w in action.weights])
    values = [load(plan.source, w) for w in action.weights]
    shared = _shared_amax(action, values)
    method = cast(weights.Method, action.method)
    found = []
    for weight, value in zip(action.weights, values, strict=True):
        with _naming(weight):
            found.append(weights.encode(value, action.format.name, method=method, amax=shared))
    return found, 0, 0


def _shared_amax(action: Encode, values: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the maximum that a fused group shares, None for a format without a global scale."""
    if not action.format.packed:
        return None
    found: list[torch.Tensor] = []
    for weight, value in zip(action.weights, values, strict=True):
        with _naming(weight):
            found.append(codecs.amax(value, action.format.name))
    return torch.stack(found).amax()


@contextmanager
def _naming(weight: Weight) -> Iterator[None]:
    try:
        yield
    except EncodeError as error:
        raise EncodeError(f"{weight.name}: {error}") from error


def load(ckpt: Checkpoint, weight: Weight) -> torch.Tensor:
    """Return the values of a weight, [out, in]: as stored, or decoded to float32.

    Raises:
        EncodeError: the tensors of a quantized weight do not fit one another.
    """
    parts = _parts(ckpt, weight)
    if weight.format is None:
        return parts["weight"]
    with _naming(weight):
        return codecs.decode(parts, weight.format.name)


def _parts(ckpt: Checkpoint, weight: Weight) -> codecs.Parts:
    return {leaf: _tensor(ckpt, t) for leaf, t in weight.parts.items()}


def _tensor(ckpt: Checkpoint, tensor: Tensor) -> torch.Tensor:
    """Return a tensor of a checkpoint; FP8 codes as their bytes."""
    raw = ckpt.read(tensor)
    if not raw.flags.writeable:  # a remote read is bytes, and torch warns of every view on them
        raw = raw.copy()
    return torch.from_numpy(raw).view(_TORCH.get(tensor.dtype, torch.uint8)).reshape(tensor.shape)


def _bytes(t: torch.Tensor) -> memoryview:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _scale_range(parts: dict[str, torch.Tensor]) -> tuple[float, float]:
    scale = parts["weight_scale"] if "weight_scale" in parts else parts["weight_scale_inv"]
    if scale.dtype == torch.float32:
        return float(scale.min()), float(scale.max())
    if scale.dtype == torch.uint8:
        return 2.0 ** (int(scale.min()) - 127), 2.0 ** (int(scale.max()) - 127)
    # E4M3 without a sign orders like its bytes.
    raw, whole = scale.view(torch.uint8), parts["weight_scale_2"].item()
    ends = torch.stack([raw.min(), raw.max()]).view(torch.float8_e4m3fn).float()
    return ends[0].item() * whole, ends[1].item() * whole


def _digest(fd: int) -> str:
    state = hashlib.sha256()
    for block in _blocks(fd):
        state.update(block)
    return state.hexdigest()


def _blocks(fd: int) -> Iterator[bytes]:
    offset = 0
    while block := os.pread(fd, COPY_BYTES, offset):
        yield block
        offset += len(block)
