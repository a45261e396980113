# SPDX-License-Identifier: Apache-2.0
"""What a plan is made of: for every tensor that will be written, where its bytes come from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from verifier.checkpoint import DTYPE_BITS, Checkpoint, Tensor
from verifier.schemes import Format, fused_groups

Origin = Literal["source", "onto"]


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = 1
        for s in self.shape:
            count *= s
        return count * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Copy:
    """Pass a tensor through, byte for byte."""

    tensor: Tensor
    origin: Origin

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The one tensor that it writes."""
        return (Spec(self.tensor.name, self.tensor.dtype, self.tensor.shape),)


@dataclass(frozen=True, slots=True)
class Constant:
    """Write a float32 scalar."""

    name: str
    value: float

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The one tensor that it writes."""
        return (Spec(self.name, "F32", ()),)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight to be read, [out, in]: its tensors by leaf, and the format that they are in (None: unquantized)."""

    tensor: Tensor
    parts: Mapping[str, Tensor]
    format: Format | None
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """The name of its weight tensor on disk."""
        return self.tensor.name


@dataclass(frozen=True, slots=True)
class Decode:
    """Write a quantized weight's values as BF16 under its unquantized name."""

    name: str
    weight: Weight
    origin: Origin

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The one tensor that it writes."""
        return (Spec(self.name, "BF16", self.weight.shape),)


@dataclass(frozen=True, slots=True)
class Encode:
    """Quantize the weights of a fused group (or one weight) together: they share their global scale.

    ``scale_leaf`` names the block, row or tensor scale; ``input_scales`` gives each module's activation scale, None
    where it has none; ``method`` is the weight calibration (`exporter.weights`), ``max`` for formats that have no other,
    ``exact`` for MXFP4 to NVFP4.
    """

    modules: tuple[str, ...]
    weights: tuple[Weight, ...]
    format: Format
    scale_leaf: str
    input_scales: tuple[float, ...] | None
    method: str = "max"

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensors that it writes, module by module."""
        return tuple(s for i in range(len(self.modules)) for s in self.specs_of(i))

    def specs_of(self, index: int) -> tuple[Spec, ...]:
        """Return the tensors of one module."""
        module, (out, in_) = self.modules[index], self.weights[index].shape
        found = [Spec(f"{module}.weight", self.format.weight_dtype, (out, in_ // 2 if self.format.packed else in_))]
        for sibling in self.format.siblings:
            leaf = sibling.leaves[0]
            if leaf == "input_scale":
                continue
            leaf = self.scale_leaf if self.scale_leaf in sibling.leaves else leaf
            found.append(Spec(f"{module}.{leaf}", sibling.dtypes[0], sibling.shapes(out, in_)[0]))
        if self.input_scales is not None:
            found.append(Spec(f"{module}.input_scale", "F32", ()))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Take:
    """Write a tensor, or a region of one, under a name of its own; its bytes are moved, never changed.

    ``cuts`` gives start, step and length on each axis and whether the axis is dropped; empty takes the whole tensor.
    ``order`` permutes what remains.
    """

    name: str
    tensor: Tensor
    origin: Origin
    cuts: tuple[tuple[int, int, int, bool], ...] = ()
    order: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every byte of the tensor is taken, in the order of the file."""
        full = all(c == (0, 1, n, False) for c, n in zip(self.cuts, self.tensor.shape, strict=False))
        return full and self.order == tuple(sorted(self.order))

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The one tensor that it writes."""
        left = [length for _, _, length, drop in self.cuts if not drop] if self.cuts else list(self.tensor.shape)
        shape = tuple(left[i] for i in self.order) if self.order else tuple(left)
        return (Spec(self.name, self.tensor.dtype, shape),)


Action = Copy | Constant | Decode | Encode | Take


@dataclass(frozen=True, slots=True)
class Stats:
    """What a stats file holds: input maxima by hub module, and KV maxima by ``<hub k_proj>.k_amax``, ``….v_amax``."""

    inputs: Mapping[str, float]
    kv: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Every tensor to be written has one action; every tensor that is not taken has its reason in ``left``."""

    kind: Literal["export", "merge", "repair"]
    name: str
    source: Checkpoint
    onto: Checkpoint | None
    actions: tuple[Action, ...]
    left: tuple[tuple[Origin, str, str], ...]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def kept(self) -> Checkpoint:
        """The checkpoint whose bytes and configs are kept."""
        return self.onto or self.source

    @cached_property
    def specs(self) -> tuple[Spec, ...]:
        """Every tensor to be written."""
        return tuple(s for a in self.actions for s in a.specs)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors to be written."""
        return sum(s.nbytes for s in self.specs)

    @property
    def encodes(self) -> Iterator[Encode]:
        """The quantizations."""
        return (a for a in self.actions if isinstance(a, Encode))

    def origin(self, name: Origin) -> Checkpoint:
        """Return the checkpoint that an action copies from."""
        return self.onto if name == "onto" and self.onto is not None else self.source

    def formats(self) -> Counter[str]:
        """Return how many modules are quantized to each algorithm by this plan."""
        return Counter({a: n for a, n in _count(self.encodes)})

    def stacked(self) -> Counter[str]:
        """Return by algorithm how many tensors the quantized modules are where fused groups are one each."""
        algo = {m: e.format.algo for e in self.encodes for m in e.modules}
        found = Counter(algo.values())
        for _, members in fused_groups(algo):
            found[algo[members[0]]] -= len(members) - 1
        return found

    def requantized(self) -> Counter[tuple[str, str]]:
        """Return how many quantized modules are decoded and written anew, by (algorithm read, algorithm written)."""
        found: Counter[tuple[str, str]] = Counter()
        for a in self.actions:
            if isinstance(a, Encode):
                found.update((w.format.algo, a.format.algo) for w in a.weights if w.format is not None)
            elif isinstance(a, Decode) and a.weight.format is not None:
                found[a.weight.format.algo, "BF16"] += 1
        return found

    def fingerprint(self) -> str:
        """Return a digest of everything that decides the output's bytes."""
        parts: list[object] = [self.kind, self.options]
        for ckpt in (self.source, self.onto):
            parts.append(None if ckpt is None else header_digest(ckpt))
        for a in self.actions:
            parts.append([[s.name, s.dtype, s.shape] for s in a.specs])
            if isinstance(a, Constant):
                parts.append(a.value)
            elif isinstance(a, Encode):
                parts.append([a.input_scales, a.method, [w.format.name if w.format else None for w in a.weights]])
            elif isinstance(a, Decode):
                parts.append([a.origin, a.weight.format.name if a.weight.format else None])
            elif isinstance(a, Take):
                parts.append([a.origin, a.tensor.name, a.cuts, a.order])
            else:
                parts.append(a.origin)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _count(encodes: Iterable[Encode]) -> Iterator[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for e in encodes:
        counts[e.format.algo] += len(e.modules)
    yield from counts.items()


def header_digest(ckpt: Checkpoint) -> str:
    """Return a digest of the names, dtypes, shapes and places of a checkpoint's tensors, and of its file sizes."""
    state = hashlib.sha256()
    for shard in ckpt.shards:
        state.update(f"{shard.file}\0{shard.size}\0".encode())
        for t in shard.tensors.values():
            state.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.offset}\0".encode())
    return state.hexdigest()
