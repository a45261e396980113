# SPDX-License-Identifier: Apache-2.0
"""What a plan is made of: for every tensor that will be written, where its bytes come from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from exporter.layout import Stack
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
    """A weight to be read, [out, in]: its tensors by leaf, and the format that they are in (None:
    unquantized).
    """

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
    """Quantize the weights of a fused group (or one weight) together: they share their global
    scale.

    ``scale_leaf`` names the block, row or tensor scale; ``input_scales`` gives each module's
    activation scale, None where it has none; ``method`` is the weight calibration
    (`exporter.weights`), ``max`` for formats that have no other, ``exact`` for MXFP4 to NVFP4.
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
        found = [
            Spec(
                f"{module}.weight",
                self.format.weight_dtype,
                (out, in_ // 2 if self.format.packed else in_),
            )
        ]
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
    """Write a tensor, or a region of one, under a name of its own; its bytes are moved, never
    changed.

    ``cuts`` gives start, step and length on each axis and whether the axis is dropped; empty takes
    the whole tensor. ``order`` permutes what remains.
    """

    name: str
    tensor: Tensor
    origin: Origin
    cuts: tuple[tuple[int, int, int, bool], ...] = ()
    order: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every byte of the tensor is taken, in the order of the file."""
        full = all(
            c == (0, 1, n, False) for c, n in zip(self.cuts, self.tensor.shape, strict=False)
        )
        return full and self.order == tuple(sorted(self.order))

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The one tensor that it writes."""
        left = (
            [length for _, _, length, drop in self.cuts if not drop]
            if self.cuts
            else list(self.tensor.shape)
        )
        shape = tuple(left[i] for i in self.order) if self.order else tuple(left)
        return (Spec(self.name, self.tensor.dtype, shape),)


@dataclass(frozen=True, slots=True)
class Restack:
    """Write the stacks of gate and up of a layer, or that of down, as stacks: quantized, or decoded
    (``format`` None).

    Blocks run along the input axis whatever the stack's own axes, and gate and up keep their order.
    ``read`` is the format that they are in. ``input_scales`` gives one for each expert; where the
    family has one scale for a whole stack, so have all of them, and ``weight_scale_2`` is shared
    over the stack.
    """

    stacks: tuple[Stack, ...]
    read: Format | None
    format: Format | None
    scale_leaf: str = ""
    input_scales: tuple[float, ...] | None = None
    method: str = "max"

    @property
    def modules(self) -> tuple[str, ...]:
        """The linears that it holds, as they are called one by one."""
        return tuple(m for s in self.stacks for m in s.members)

    @property
    def one_scale(self) -> bool:
        """Whether a stack has one global scale, not one for each expert."""
        return self.stacks[0].family.one_scale

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensors that it writes, stack by stack."""
        return tuple(s for i in range(len(self.stacks)) for s in self.specs_of(i).values())

    def specs_of(self, index: int) -> dict[str, Spec]:
        """Return the tensors of one stack by leaf."""
        stack = self.stacks[index]
        experts, out, in_ = stack.shape

        def sized(*inner: int) -> tuple[int, ...]:
            turned = stack.written_turned and len(inner) == 2
            return (experts, *(inner[::-1] if turned else inner))

        if self.format is None:
            return {"weight": Spec(stack.key, "BF16", sized(out, in_))}
        fmt = self.format
        found = {
            "weight": Spec(stack.key, fmt.weight_dtype, sized(out, in_ // 2 if fmt.packed else in_))
        }
        for sibling in fmt.siblings:
            leaf = self.scale_leaf if self.scale_leaf in sibling.leaves else sibling.leaves[0]
            if leaf == "input_scale":
                continue
            shape = sibling.shapes(out, in_)[0]
            found[leaf] = Spec(
                stack.sibling(leaf),
                sibling.dtypes[0],
                () if not shape and self.one_scale else sized(*shape),
            )
        if self.input_scales is not None:
            found["input_scale"] = Spec(
                stack.sibling("input_scale"), "F32", () if self.one_scale else (experts,)
            )
        return found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the source that it reads."""
        leaves = (
            ("weight",)
            if self.read is None
            else tuple(s for x in self.read.siblings for s in x.leaves)
        )
        return tuple(
            t
            for s in self.stacks
            for leaf, t in s.parts.items()
            if leaf in ("weight", "blocks") or (leaf in leaves and not leaf.startswith("input"))
        )


Action = Copy | Constant | Decode | Encode | Restack | Take


@dataclass(frozen=True, slots=True)
class Stats:
    """What a stats file holds: input maxima by hub module, and KV maxima by ``<hub
    k_proj>.k_amax``, ``….v_amax``.
    """

    inputs: Mapping[str, float]
    kv: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Every tensor to be written has one action; every tensor that is not taken has its reason in
    ``left``.
    """

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
        """The quantizations of linears that are written one by one."""
        return (a for a in self.actions if isinstance(a, Encode))

    @property
    def restacks(self) -> Iterator[Restack]:
        """The quantizations of stacks."""
        return (a for a in self.actions if isinstance(a, Restack) and a.format is not None)

    @property
    def modules(self) -> Mapping[str, Format]:
        """The linears that this plan quantizes, those in stacks as they are called one by one, with
        their formats.
        """
        found = {m: e.format for e in self.encodes for m in e.modules}
        return found | {
            m: r.format for r in self.restacks for m in r.modules if r.format is not None
        }

    def origin(self, name: Origin) -> Checkpoint:
        """Return the checkpoint that an action copies from."""
        return self.onto if name == "onto" and self.onto is not None else self.source

    def formats(self) -> Counter[str]:
        """Return how many modules are quantized to each algorithm by this plan."""
        return Counter(f.algo for f in self.modules.values())

    def stacked(self) -> Counter[str]:
        """Return by algorithm how many tensors the quantized modules are where fused groups are one
        each.
        """
        algo = {m: f.algo for m, f in self.modules.items()}
        found = Counter(algo.values())
        for _, members in fused_groups(algo):
            found[algo[members[0]]] -= len(members) - 1
        return found

    def requantized(self) -> Counter[tuple[str, str]]:
        """Return how many quantized modules are decoded and written anew, by (algorithm read,
        algorithm written).
        """
        found: Counter[tuple[str, str]] = Counter()
        for a in self.actions:
            if isinstance(a, Encode):
                found.update(
                    (w.format.algo, a.format.algo) for w in a.weights if w.format is not None
                )
            elif isinstance(a, Decode) and a.weight.format is not None:
                found[a.weight.format.algo, "BF16"] += 1
            elif isinstance(a, Restack) and a.read is not None:
                found[a.read.algo, a.format.algo if a.format is not None else "BF16"] += len(
                    a.modules
                )
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
                parts.append(
                    [
                        a.input_scales,
                        a.method,
                        [w.format.name if w.format else None for w in a.weights],
                    ]
                )
            elif isinstance(a, Decode):
                parts.append([a.origin, a.weight.format.name if a.weight.format else None])
            elif isinstance(a, Take):
                parts.append([a.origin, a.tensor.name, a.cuts, a.order])
            elif isinstance(a, Restack):
                formats = [f.name if f else None for f in (a.read, a.format)]
                parts.append([a.input_scales, a.method, *formats])
            else:
                parts.append(a.origin)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def header_digest(ckpt: Checkpoint) -> str:
    """Return a digest of the names, dtypes, shapes and places of a checkpoint's tensors, and of its
    file sizes.
    """
    state = hashlib.sha256()
    for shard in ckpt.shards:
        state.update(f"{shard.file}\0{shard.size}\0".encode())
        for t in shard.tensors.values():
            state.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.offset}\0".encode())
    return state.hexdigest()
