# SPDX-License-Identifier: Apache-2.0
"""The parts of a plan: for every tensor to be written, where its bytes come from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from exporter.layout import Cut
from verifier.checkpoint import DTYPE_BITS, Checkpoint, Tensor
from verifier.layouts.expert_stacks import StoredStack
from verifier.schemes import Engine, Format, fused_groups

Origin = Literal["source", "onto"]
Skipped = tuple[Origin, str, str]
"""A tensor that is not read: its checkpoint, its name, the reason."""
DEFAULT_ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
"""The engines that have to load what is written, unless others are requested."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a tensor byte for byte."""

    tensor: Tensor
    origin: Origin

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensor that it writes."""
        return (Spec(self.tensor.name, self.tensor.dtype, self.tensor.shape),)


@dataclass(frozen=True, slots=True)
class Constant:
    """Write a float32 scalar."""

    name: str
    value: float

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensor that it writes."""
        return (Spec(self.name, "F32", ()),)


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A weight to read, [out, in]: its tensors by leaf, and their format (None: unquantized)."""

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
    weight: SourceWeight
    origin: Origin

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensor that it writes."""
        return (Spec(self.name, "BF16", self.weight.shape),)


@dataclass(frozen=True, slots=True)
class Encode:
    """Quantize the weights of a fused group (or one weight) together: they share their global
    scale.

    ``scale_leaf`` names the block, row or tensor scale; ``input_scales`` gives each module's
    activation scale, None where it has none; ``method`` is the weight calibration
    (`exporter.weights`), ``max`` for formats that have no other, ``exact`` for MXFP4 to NVFP4.
    """

    modules: tuple[str, ...]
    weights: tuple[SourceWeight, ...]
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
        width = in_ // 2 if self.format.packed else in_
        specs = [Spec(f"{module}.weight", self.format.weight_dtype, (out, width))]
        for sibling in self.format.siblings:
            leaf = sibling.leaves[0]
            if leaf == "input_scale":
                continue
            leaf = self.scale_leaf if self.scale_leaf in sibling.leaves else leaf
            specs.append(Spec(f"{module}.{leaf}", sibling.dtypes[0], sibling.shapes(out, in_)[0]))
        if self.input_scales is not None:
            specs.append(Spec(f"{module}.input_scale", "F32", ()))
        return tuple(specs)


@dataclass(frozen=True, slots=True)
class Take:
    """Write a tensor, or a region of one, under a different name; its bytes move unchanged.

    ``cuts`` has one cut per axis; empty takes the whole tensor. ``order`` permutes the remaining
    axes.
    """

    name: str
    tensor: Tensor
    origin: Origin
    cuts: tuple[Cut, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every byte of the tensor is taken, in the order of the file."""
        pairs = zip(self.cuts, self.tensor.shape, strict=False)
        return all(cut == Cut(0, 1, length) for cut, length in pairs) and self.order == tuple(
            sorted(self.order)
        )

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensor that it writes."""
        lengths = self.tensor.shape
        if self.cuts:
            lengths = tuple(cut.length for cut in self.cuts if not cut.drop)
        shape = tuple(lengths[i] for i in self.order) if self.order else lengths
        return (Spec(self.name, self.tensor.dtype, shape),)


@dataclass(frozen=True, slots=True)
class Restack:
    """Write the stacks of gate and up of a layer, or that of down, as stacks: quantized, or decoded
    (``format`` None).

    Blocks run along the input axis whatever the stack's own axes, and gate and up keep their order.
    ``read`` is the format of the source. ``input_scales`` has one scale per expert, or a single one
    where the family has one scale per stack; the stack then shares ``weight_scale_2`` as well.
    """

    stacks: tuple[StoredStack, ...]
    read: Format | None
    format: Format | None
    scale_leaf: str = ""
    input_scales: tuple[float, ...] | None = None
    method: str = "max"

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear layers that it holds, by their names as single experts."""
        return tuple(m for s in self.stacks for m in s.linears)

    @property
    def one_scale(self) -> bool:
        """Whether a stack has one global scale, not one per expert."""
        return self.stacks[0].layout.one_scale

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensors that it writes, stack by stack."""
        return tuple(s for i in range(len(self.stacks)) for s in self.specs_of(i).values())

    def specs_of(self, index: int) -> dict[str, Spec]:
        """Return the tensors of one stack by leaf."""
        stack = self.stacks[index]
        experts, out, in_ = stack.shape

        def stacked(*inner: int) -> tuple[int, ...]:
            transposed = stack.hub_transposed and len(inner) == 2
            return (experts, *(inner[::-1] if transposed else inner))

        if self.format is None:
            return {"weight": Spec(stack.key, "BF16", stacked(out, in_))}
        fmt = self.format
        width = in_ // 2 if fmt.packed else in_
        specs = {"weight": Spec(stack.key, fmt.weight_dtype, stacked(out, width))}
        for sibling in fmt.siblings:
            leaf = self.scale_leaf if self.scale_leaf in sibling.leaves else sibling.leaves[0]
            if leaf == "input_scale":
                continue
            shape = sibling.shapes(out, in_)[0]
            full = () if not shape and self.one_scale else stacked(*shape)
            specs[leaf] = Spec(stack.sibling(leaf), sibling.dtypes[0], full)
        if self.input_scales is not None:
            shape = () if self.one_scale else (experts,)
            specs["input_scale"] = Spec(stack.sibling("input_scale"), "F32", shape)
        return specs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the source that it reads."""
        leaves = {"weight", "blocks"}
        if self.read is not None:
            leaves |= {leaf for sibling in self.read.siblings for leaf in sibling.leaves}
        return tuple(
            tensor
            for stack in self.stacks
            for leaf, tensor in stack.tensors.items()
            if leaf in leaves and not leaf.startswith("input")
        )


Action = Copy | Constant | Decode | Encode | Restack | Take


@dataclass(frozen=True)
class Plan:
    """One action per tensor to be written; ``skipped`` lists every tensor that is not read, as
    (checkpoint, name, reason); ``adapted`` says what was changed so that ``engines`` load the
    result.
    """

    kind: Literal["export", "merge", "repair"]
    name: str
    source: Checkpoint
    onto: Checkpoint | None
    actions: tuple[Action, ...]
    skipped: tuple[Skipped, ...]
    options: dict[str, object] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    engines: tuple[Engine, ...] = DEFAULT_ENGINES

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
        """The quantizations of linear layers that are written individually."""
        return (a for a in self.actions if isinstance(a, Encode))

    @property
    def restacks(self) -> Iterator[Restack]:
        """The quantizations of stacks."""
        return (a for a in self.actions if isinstance(a, Restack) and a.format is not None)

    @property
    def modules(self) -> Mapping[str, Format]:
        """The linear layers that this plan quantizes with their formats; those in stacks by their
        names as single experts.
        """
        formats = {m: e.format for e in self.encodes for m in e.modules}
        for restack in self.restacks:
            if restack.format is not None:
                formats |= dict.fromkeys(restack.modules, restack.format)
        return formats

    def origin(self, name: Origin) -> Checkpoint:
        """Return the checkpoint that an action copies from."""
        return self.onto if name == "onto" and self.onto is not None else self.source

    def formats(self) -> Counter[str]:
        """Return how many modules are quantized to each algorithm by this plan."""
        return Counter(f.algo for f in self.modules.values())

    def fused(self) -> Counter[str]:
        """Return how many tensors an engine has of the quantized modules, by algorithm: a fused
        group counts once.
        """
        algo = {m: f.algo for m, f in self.modules.items()}
        counts = Counter(algo.values())
        for _, members in fused_groups(algo, self.source.model_type):
            counts[algo[members[0]]] -= len(members) - 1
        return counts

    def requantized(self) -> Counter[tuple[str, str]]:
        """Return how many quantized modules are decoded and re-written, by (algorithm read,
        algorithm written).
        """
        counts: Counter[tuple[str, str]] = Counter()
        for a in self.actions:
            if isinstance(a, Encode):
                read = (w.format for w in a.weights if w.format is not None)
                counts.update((fmt.algo, a.format.algo) for fmt in read)
            elif isinstance(a, Decode) and a.weight.format is not None:
                counts[a.weight.format.algo, "BF16"] += 1
            elif isinstance(a, Restack) and a.read is not None:
                written = a.format.algo if a.format is not None else "BF16"
                counts[a.read.algo, written] += len(a.modules)
        return counts

    def fingerprint(self) -> str:
        """Return a digest of everything that decides the output's bytes."""
        parts: list[object] = [self.kind, self.options]
        for ckpt in (self.source, self.onto):
            parts.append(None if ckpt is None else header_digest(ckpt))
        for action in self.actions:
            parts.append([[s.name, s.dtype, s.shape] for s in action.specs])
            parts.append(_inputs(action))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _inputs(action: Action) -> object:
    """Return what decides the bytes of an action besides its specs."""
    if isinstance(action, Constant):
        return action.value
    if isinstance(action, Encode):
        return [action.input_scales, action.method, [_name(w.format) for w in action.weights]]
    if isinstance(action, Decode):
        return [action.origin, _name(action.weight.format)]
    if isinstance(action, Take):
        return [action.origin, action.tensor.name, action.cuts, action.order]
    if isinstance(action, Restack):
        return [action.input_scales, action.method, _name(action.read), _name(action.format)]
    return action.origin


def _name(fmt: Format | None) -> str | None:
    return fmt.name if fmt is not None else None


def header_digest(ckpt: Checkpoint) -> str:
    """Return a digest of the names, dtypes, shapes and offsets of a checkpoint's tensors, and of
    its file sizes.
    """
    state = hashlib.sha256()
    for shard in ckpt.shards:
        state.update(f"{shard.file}\0{shard.size}\0".encode())
        for t in shard.tensors.values():
            state.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.offset}\0".encode())
    return state.hexdigest()
