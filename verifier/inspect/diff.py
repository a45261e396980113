# SPDX-License-Identifier: Apache-2.0
"""Differences between two checkpoints: names, dtypes, shapes, configs, sizes, precision; optionally
bytes.

Differences are grouped by kind and by name (layer and expert numbers as ranges). The distribution
over shards and the auxiliary files are reported, and do not count as differences.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.errors import ContentError
from verifier.inspect.names import NameGroup, gathered
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import FLOATS, Module, collapse, role

CHUNK = 1 << 26
CONFIGS = ("config.json", "hf_quant_config.json")
Progress = Callable[[int, int], None]
Kind = Literal["only A", "only B", "dtype", "shape", "dtype and shape", "config", "bytes"]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference and the names that share it; ``a`` and ``b`` describe each side."""

    kind: Kind
    names: NameGroup
    a: str = ""
    b: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One checkpoint in numbers; ``precision`` counts modules by (role, format or dtype)."""

    uri: str
    tensors: int
    shards: int
    nbytes: int
    precision: Mapping[tuple[str, str], int]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Diff:
    """The differences of two checkpoints. ``compared`` counts common tensors whose bytes were read;
    None if no bytes were read.
    """

    a: Side
    b: Side
    common: int
    changes: tuple[Change, ...]
    files: tuple[str, ...] = ()
    compared: int | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs and both could be read completely."""
        return not self.changes and not self.a.problems and not self.b.problems

    def of(self, *kinds: Kind) -> tuple[Change, ...]:
        """Return the changes of these kinds."""
        return tuple(c for c in self.changes if c.kind in kinds)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    payload: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints and return the differences.

    Args:
        a: the first checkpoint, a path or an fsspec URL.
        b: the second.
        payload: also compare the bytes of tensors with equal name, dtype and shape.
        progress: called with (bytes read, total bytes).

    Raises:
        UsageError: no such directory.
        ContentError: A or B is not a checkpoint, or a config is nested too deeply.
        MachineError: reading failed.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    changes = layout(left, right)
    try:
        changes += [c for name in CONFIGS for c in _config(name, left, right)]
    except RecursionError:
        message = f"a config of {left.uri} or {right.uri} is nested too deeply to compare"
        raise ContentError(message) from None
    common = left.tensors.keys() & right.tensors.keys()
    compared = None
    if payload:
        different, compared = _bytes(left, right, progress)
        changes += different
    return Diff(
        side_of(left),
        side_of(right),
        len(common),
        tuple(changes),
        tuple(_files(left, right)),
        compared,
    )


def layout(left: Checkpoint, right: Checkpoint) -> list[Change]:
    """Return the differences in names, dtypes and shapes."""
    changes: list[Change] = []
    for kind, one, other_one in (("only A", left, right), ("only B", right, left)):
        only: dict[str, list[str]] = {}
        for name, t in one.tensors.items():
            if name not in other_one.tensors:
                only.setdefault(_described(t), []).append(name)
        for text, names in only.items():
            sides = {"a": text} if kind == "only A" else {"b": text}
            changes += [Change(kind, n, **sides) for n in gathered(names)]  # type: ignore[arg-type]
    pairs: dict[tuple[Kind, str, str], list[str]] = {}
    for name, t in left.tensors.items():
        other = right.tensors.get(name)
        if other is None or (t.dtype == other.dtype and t.shape == other.shape):
            continue
        both = t.dtype != other.dtype and t.shape != other.shape
        kind_: Kind = (
            "dtype and shape" if both else ("shape" if t.dtype == other.dtype else "dtype")
        )
        pairs.setdefault((kind_, _described(t), _described(other)), []).append(name)
    for (kind_, left_text, right_text), names in pairs.items():
        changes += [Change(kind_, n, left_text, right_text) for n in gathered(names)]
    return changes


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def side_of(checkpoint: Checkpoint) -> Side:
    """Return one checkpoint in numbers."""
    quantized = QuantizedCheckpoint(checkpoint)
    precision = Counter(
        (role(m.name), precision_of(quantized, m))
        for m in quantized.modules.values()
        if m.weight is not None
    )
    return Side(
        checkpoint.uri,
        len(checkpoint.tensors),
        len(checkpoint.shards),
        checkpoint.nbytes,
        dict(precision),
        problems_of(checkpoint),
    )


def problems_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return why a checkpoint cannot be read completely, one sentence per problem."""
    problems = [*checkpoint.problems, *(p for s in checkpoint.shards for p in s.problems)]
    index = checkpoint.index
    missing: list[str] = []
    if index is not None:
        problems += index.problems
        missing = sorted(set(index.weight_map.values()) - checkpoint.files.keys())
    texts = [f"{p.file}: {p.message}{f' ({p.tensor})' if p.tensor else ''}" for p in problems]
    return (*texts, *(f"{f}: named by the index, but missing" for f in missing))


def precision_of(quantized: QuantizedCheckpoint, module: Module) -> str:
    """Return the algorithm of a quantized module, ``undetermined``, or the dtype of an unquantized
    weight.
    """
    if not module.quantized:
        return module.weight.dtype if module.weight is not None else "none"
    format_ = quantized.format_of(module) or module.inferred_format
    return format_.algo if format_ is not None else "undetermined"


def _files(left: Checkpoint, right: Checkpoint) -> Iterator[str]:
    """Yield the auxiliary files that only one checkpoint has, or that differ in size."""
    a, b = _auxiliary(left), _auxiliary(right)
    for name in sorted(a.keys() | b.keys()):
        if name not in b:
            yield f"{name} only in A"
        elif name not in a:
            yield f"{name} only in B"
        elif a[name] != b[name]:
            yield f"{name} {a[name]:,} → {b[name]:,} bytes"


def _auxiliary(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the size of every file that is not a shard, an index or a config."""
    return {
        name: size
        for name, size in checkpoint.files.items()
        if not name.endswith((".safetensors", ".index.json")) and name not in CONFIGS
    }


# configs


def _config(file: str, left: Checkpoint, right: Checkpoint) -> Iterator[Change]:
    configs = [c.config if file == "config.json" else c.hf_quant_config for c in (left, right)]
    left_config, right_config = configs
    if left_config is None or right_config is None:
        if (file in left.files) != (file in right.files):
            kind: Kind = "only A" if file in left.files else "only B"
            yield Change(kind, gathered([file])[0], file=file)
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for path, a, b in _fields(left_config, right_config):
        groups.setdefault((a, b), []).append(path)
    for (a, b), paths in groups.items():
        for names in gathered(paths):
            yield Change("config", names, a, b, file)


def _fields(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted path, value in A, value in B) of fields that differ; a missing value is ''."""
    for key in [*a, *(k for k in b if k not in a)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        left, right = a.get(key, _MISSING), b.get(key, _MISSING)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _fields(left, right, path)
        elif _are_texts(left) and _are_texts(right):
            yield from _lists(path, left, right)
        elif isinstance(left, Mapping) and right is _MISSING and left:
            yield from _fields(left, {}, path)
        elif isinstance(right, Mapping) and left is _MISSING and right:
            yield from _fields({}, right, path)
        elif _canonical(left) != _canonical(right):
            yield path, _value(left), _value(right)


_MISSING = object()


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _lists(path: str, a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the entries that only one of two lists of strings has, else a different order."""
    left, right = Counter(a), Counter(b)
    for entry in left - right:
        yield f"{path}: {entry}", "listed", ""
    for entry in right - left:
        yield f"{path}: {entry}", "", "listed"
    if left == right and list(a) != list(b):
        yield path, "the same entries", "in a different order"


def _canonical(value: Any) -> str:
    return "" if value is _MISSING else json.dumps(value, sort_keys=True)


def _value(value: Any) -> str:
    """Return a value as JSON, a long list by its length and its beginning; '' if it is missing."""
    if value is _MISSING:
        return ""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 120:
        return text
    return (
        f"{len(value)} entries {text[:100]}…"
        if isinstance(value, list | dict)
        else f"{text[:119]}…"
    )


# bytes


def _bytes(
    left: Checkpoint, right: Checkpoint, progress: Progress | None
) -> tuple[list[Change], int]:
    """Return the differences in bytes, and how many tensors were compared."""
    pairs = list(_comparable(left, right))
    left.expect(tensor for tensor, _ in pairs)
    right.expect(other for _, other in pairs)
    total, done = sum(t.nbytes for t, _ in pairs), 0
    groups: dict[str, tuple[NameGroup, list[_Differing], list[Tensor]]] = {}
    for tensor, other in pairs:
        differing = _Differing()
        for start in range(0, tensor.nbytes, CHUNK):
            length = min(CHUNK, tensor.nbytes - start)
            a = left.source.read(tensor.file, tensor.offset + start, length)
            b = right.source.read(other.file, other.offset + start, length)
            differing.add(tensor, start, a, b)
            done += length
            if progress:
                progress(done, total)
        if differing.elements:
            pattern = collapse(tensor.name)
            group = groups.setdefault(pattern, (NameGroup(pattern, tensor.name), [], []))
            group[0].add(tensor.name)
            group[1].append(differing)
            group[2].append(tensor)
    changes = [
        Change("bytes", names, *_summary(entries, tensors))
        for names, entries, tensors in groups.values()
    ]
    return changes, len(pairs)


def _comparable(left: Checkpoint, right: Checkpoint) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of tensors with equal name, dtype and shape."""
    for name, tensor in left.tensors.items():
        other = right.tensors.get(name)
        if other is not None and (other.dtype, other.shape) == (tensor.dtype, tensor.shape):
            yield tensor, other


class _Differing:
    """How much two tensors differ: the number of elements, the first one, and for floats the
    largest difference.
    """

    def __init__(self) -> None:
        self.elements = 0
        self.first: tuple[int, str, str] | None = None
        self.largest: float | None = None

    def add(
        self, tensor: Tensor, start: int, a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]
    ) -> None:
        """Compare the bytes from ``start`` on."""
        if np.array_equal(a, b):
            return
        size = max(1, tensor.nbytes // max(1, tensor.elements))
        indices = np.flatnonzero((a.reshape(-1, size) != b.reshape(-1, size)).any(axis=1))
        self.elements += int(indices.size)
        at = int(indices[0]) * size
        if self.first is None:
            self.first = (
                start + at,
                a[at : at + size].tobytes().hex(),
                b[at : at + size].tobytes().hex(),
            )
        if tensor.dtype in FLOATS:
            dtype = NUMPY_DTYPES[tensor.dtype]
            with np.errstate(over="ignore", invalid="ignore"):
                difference = a.view(dtype)[indices].astype(np.float64)
                difference -= b.view(dtype)[indices].astype(np.float64)
                gap = np.abs(difference)
            self.largest = max(self.largest or 0.0, float(np.nanmax(gap, initial=0.0)))


def _summary(entries: Sequence[_Differing], tensors: Sequence[Tensor]) -> tuple[str, str]:
    """Return the number of different elements, and the first one of the first tensor."""
    count, of = sum(d.elements for d in entries), sum(t.elements for t in tensors)
    largest = [d.largest for d in entries if d.largest is not None]
    gap = f", by at most {max(largest):.3g}" if largest else ""
    first = entries[0].first or (0, "", "")
    return (
        f"{count:,} of {of:,} elements differ{gap}",
        f"first at byte {first[0]:,}: {first[1]} → {first[2]}",
    )
