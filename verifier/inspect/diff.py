# SPDX-License-Identifier: Apache-2.0
"""What differs between two checkpoints: names, dtypes, shapes, configs, sizes, precision, and on
request bytes.

Differences are grouped by name (layer and expert numbers as ranges) and by what differs. How
tensors are spread over shards and which other files lie beside them is told, and is no difference.
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
from verifier.inspect.names import Names, gathered
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import FLOATS, Module, collapse, role

CHUNK = 1 << 26
CONFIGS = ("config.json", "hf_quant_config.json")
Progress = Callable[[int, int], None]
Kind = Literal["only A", "only B", "dtype", "shape", "dtype and shape", "config", "bytes"]


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of difference over the names that share it; ``a`` and ``b`` say what stands on each
    side.
    """

    kind: Kind
    names: Names
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
    """The differences of two checkpoints. ``compared`` counts common tensors whose bytes were read,
    None without.
    """

    a: Side
    b: Side
    common: int
    changes: tuple[Change, ...]
    files: tuple[str, ...] = ()
    compared: int | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs and both could be read whole."""
        return not self.changes and not self.a.problems and not self.b.problems

    def of(self, *kinds: Kind) -> tuple[Change, ...]:
        """Return the changes of some kinds."""
        return tuple(c for c in self.changes if c.kind in kinds)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    payload: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints and return what differs.

    Args:
        a: the first checkpoint, a path or an fsspec URL.
        b: the second.
        payload: read the tensors of equal name, dtype and shape, and compare their bytes.
        progress: called with (bytes done, bytes in all) while they are read.

    Raises:
        UsageError: no such folder.
        ContentError: one of both is no checkpoint, or a config is nested too deeply.
        MachineError: reading failed.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    changes = layout(left, right)
    try:
        changes += [c for name in CONFIGS for c in _config(name, left, right)]
    except RecursionError:
        raise ContentError(
            f"a config of {left.uri} or {right.uri} is nested too deeply to compare"
        ) from None
    common = left.tensors.keys() & right.tensors.keys()
    compared = None
    if payload:
        found, compared = _bytes(left, right, progress)
        changes += found
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
    for kind, mine, theirs in (("only A", left, right), ("only B", right, left)):
        lone: dict[str, list[str]] = {}
        for name, t in mine.tensors.items():
            if name not in theirs.tensors:
                lone.setdefault(_shown(t), []).append(name)
        for text, names in lone.items():
            sides = {"a": text} if kind == "only A" else {"b": text}
            changes += [Change(kind, n, **sides) for n in gathered(names)]  # type: ignore[arg-type]
    pairs: dict[tuple[Kind, str, str], list[str]] = {}
    for name, t in left.tensors.items():
        other = right.tensors.get(name)
        if other is None or (t.dtype == other.dtype and t.shape == other.shape):
            continue
        both = t.dtype != other.dtype and t.shape != other.shape
        what: Kind = "dtype and shape" if both else ("shape" if t.dtype == other.dtype else "dtype")
        pairs.setdefault((what, _shown(t), _shown(other)), []).append(name)
    for (what, mine_text, other_text), names in pairs.items():
        changes += [Change(what, n, mine_text, other_text) for n in gathered(names)]
    return changes


def _shown(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def side_of(checkpoint: Checkpoint) -> Side:
    """Return one checkpoint in numbers."""
    judged = QuantizedCheckpoint(checkpoint)
    precision = Counter(
        (role(m.name), precision_of(judged, m))
        for m in judged.modules.values()
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
    """Return why a checkpoint cannot be read whole, a sentence each."""
    found = [*checkpoint.problems, *(p for s in checkpoint.shards for p in s.problems)]
    index = checkpoint.index
    missing: list[str] = []
    if index is not None:
        found += index.problems
        missing = sorted(set(index.weight_map.values()) - checkpoint.files.keys())
    texts = [f"{p.file}: {p.message}{f' ({p.tensor})' if p.tensor else ''}" for p in found]
    return (*texts, *(f"{f}: the index names it and it is not there" for f in missing))


def precision_of(judged: QuantizedCheckpoint, module: Module) -> str:
    """Return a module's format as its algorithm's name, ``undetermined``, or the dtype of an
    unquantized weight.
    """
    if not module.quantized:
        return module.weight.dtype if module.weight is not None else "none"
    found = judged.format_of(module) or module.inferred_format
    return found.algo if found is not None else "undetermined"


def _files(left: Checkpoint, right: Checkpoint) -> Iterator[str]:
    """Yield the files beside the shards that only one folder has, or that differ in size."""

    def beside(c: Checkpoint) -> dict[str, int]:
        return {
            n: s
            for n, s in c.files.items()
            if not n.endswith((".safetensors", ".index.json")) and n not in CONFIGS
        }

    mine, theirs = beside(left), beside(right)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in theirs:
            yield f"{name} only in A"
        elif name not in mine:
            yield f"{name} only in B"
        elif mine[name] != theirs[name]:
            yield f"{name} {mine[name]:,} → {theirs[name]:,} bytes"


# configs


def _config(file: str, left: Checkpoint, right: Checkpoint) -> Iterator[Change]:
    mine, theirs = (
        (c.config if file == "config.json" else c.hf_quant_config) for c in (left, right)
    )
    if mine is None or theirs is None:
        if (file in left.files) != (file in right.files):
            kind: Kind = "only A" if file in left.files else "only B"
            yield Change(kind, gathered([file])[0], file=file)
        return
    found: dict[tuple[str, str], list[str]] = {}
    for path, a, b in _fields(mine, theirs):
        found.setdefault((a, b), []).append(path)
    for (a, b), paths in found.items():
        for names in gathered(paths):
            yield Change("config", names, a, b, file)


def _fields(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted path, value in A, value in B) of fields that differ; a missing value is ''."""
    for key in [*a, *(k for k in b if k not in a)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        mine, theirs = a.get(key, _MISSING), b.get(key, _MISSING)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _fields(mine, theirs, path)
        elif _texts(mine) and _texts(theirs):
            yield from _lists(path, mine, theirs)
        elif isinstance(mine, Mapping) and theirs is _MISSING and mine:
            yield from _fields(mine, {}, path)
        elif isinstance(theirs, Mapping) and mine is _MISSING and theirs:
            yield from _fields({}, theirs, path)
        elif _canonical(mine) != _canonical(theirs):
            yield path, _value(mine), _value(theirs)


_MISSING = object()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _lists(path: str, a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield what differs between two lists of strings: entries of one only, else their order."""
    mine, theirs = Counter(a), Counter(b)
    for entry in mine - theirs:
        yield f"{path}: {entry}", "listed", ""
    for entry in theirs - mine:
        yield f"{path}: {entry}", "", "listed"
    if mine == theirs and list(a) != list(b):
        yield path, "the same entries", "in another order"


def _canonical(value: Any) -> str:
    return "" if value is _MISSING else json.dumps(value, sort_keys=True)


def _value(value: Any) -> str:
    """Return a value as JSON, a long list by its length and its beginning; '' where it is
    missing.
    """
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
    pairs = [
        (t, o)
        for n, t in left.tensors.items()
        if (o := right.tensors.get(n)) is not None and o.dtype == t.dtype and o.shape == t.shape
    ]
    total, done = sum(t.nbytes for t, _ in pairs), 0
    groups: dict[str, tuple[Names, list[_Differing], list[Tensor]]] = {}
    for mine, theirs in pairs:
        found = _Differing()
        for start in range(0, mine.nbytes, CHUNK):
            length = min(CHUNK, mine.nbytes - start)
            a = left.source.read(mine.file, mine.offset + start, length)
            b = right.source.read(theirs.file, theirs.offset + start, length)
            found.add(mine, start, a, b)
            done += length
            if progress:
                progress(done, total)
        if found.elements:
            names, entries, tensors = groups.setdefault(
                collapse(mine.name), (Names(collapse(mine.name), mine.name), [], [])
            )
            names.add(mine.name)
            entries.append(found)
            tensors.append(mine)
    return [
        Change("bytes", names, *_summary(entries, tensors))
        for names, entries, tensors in groups.values()
    ], len(pairs)


class _Differing:
    """How much two tensors differ: elements, the first one, and the largest difference where values
    are floats.
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
        places = np.flatnonzero((a.reshape(-1, size) != b.reshape(-1, size)).any(axis=1))
        self.elements += int(places.size)
        at = int(places[0]) * size
        if self.first is None:
            self.first = (
                start + at,
                a[at : at + size].tobytes().hex(),
                b[at : at + size].tobytes().hex(),
            )
        if tensor.dtype in FLOATS:
            dtype = NUMPY_DTYPES[tensor.dtype]
            with np.errstate(over="ignore", invalid="ignore"):
                gap = np.abs(
                    a.view(dtype)[places].astype(np.float64)
                    - b.view(dtype)[places].astype(np.float64)
                )
            self.largest = max(self.largest or 0.0, float(np.nanmax(gap, initial=0.0)))


def _summary(entries: Sequence[_Differing], tensors: Sequence[Tensor]) -> tuple[str, str]:
    """Return the count of differing elements, and the first one of the first tensor."""
    count, of = sum(d.elements for d in entries), sum(t.elements for t in tensors)
    largest = [d.largest for d in entries if d.largest is not None]
    gap = f", by at most {max(largest):.3g}" if largest else ""
    first = entries[0].first or (0, "", "")
    return (
        f"{count:,} of {of:,} elements differ{gap}",
        f"first at byte {first[0]:,}: {first[1]} → {first[2]}",
    )
