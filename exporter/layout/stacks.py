# SPDX-License-Identifier: Apache-2.0
"""Experts that a hub checkpoint holds in stacks, as the linear layers of each expert.

Which families do so, and how, is data: ``experts.yaml``. A stack is read as a grid of the experts'
weights [out, in] (`exporter.layout.Layout`, proved), so every sibling of it is cut by the meaning
of its axes, whatever the axes of the stack.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import yaml

from exporter.layout.layout import Layout
from exporter.layout.pieces import Axis, Grid, Piece, Shape
from exporter.layout.regions import Run, cut, read_region
from exporter.layout.siblings import SIBLINGS, Cut
from verifier.checkpoint import DTYPE_BITS, Checkpoint, Tensor
from verifier.checkpoint.source import Bytes, DerivedSource
from verifier.errors import PlanError

ExpertLayout = Literal["per-expert", "hub"]
MAX_EXPERTS = 10_000
_CODES = ("blocks", "scales")
_AXES = {
    "out_in": "[experts, out, in]",
    "in_out": "[experts, in, out]",
    "either": "[experts, out, in], or turned",
}


@dataclass(frozen=True, slots=True)
class Family:
    """A row of ``experts.yaml``: where the hub's stacks are, what they hold, and what is written of
    them.
    """

    name: str
    types: tuple[str, ...]
    stacks: Mapping[str, tuple[str, ...]]
    linear: str
    axes: Literal["out_in", "in_out", "either"]
    interleaved: bool
    one_scale: bool
    default: ExpertLayout
    why: str
    cite: str
    refused: str
    names: tuple[str, ...]


@cache
def families() -> tuple[Family, ...]:
    """Return the families whose hub layout holds experts in stacks, in the order of the file."""
    raw = yaml.safe_load(
        (resources.files("exporter.layout") / "experts.yaml").read_text(encoding="utf-8")
    )
    return tuple(
        Family(
            name,
            tuple(row["types"]),
            {k: tuple(v) for k, v in row.get("stacks", {}).items()},
            row.get("linear", ""),
            row.get("axes", "out_in"),
            row.get("order") == "interleaved",
            row.get("scales") == "one",
            row.get("default", "per-expert"),
            row.get("why", ""),
            row.get("cite", ""),
            row.get("refused", ""),
            tuple(row.get("names", ())),
        )
        for name, row in raw.items()
    )


def family_of(config: Mapping[str, Any] | None) -> Family | None:
    """Return the family that a config.json, or its text_config, is of; None where its experts are
    not in stacks.
    """
    top = config or {}
    text = top.get("text_config")
    found = (top.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None)
    return next((f for f in families() if any(t in f.types for t in found)), None)


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack of a layer: some projections of all its experts.

    ``key`` is the name of its weight without MXFP4's suffix, ``head`` what stands before the
    layer's own part; ``parts`` are its tensors by leaf. ``turned`` says that the weight is
    [experts, in, out] here, ``written_turned`` that the hub has it so unquantized (MXFP4 is
    [experts, out, in] in either case).
    """

    family: Family
    key: str
    head: str
    leaves: tuple[str, ...]
    shape: tuple[int, int, int]
    turned: bool
    written_turned: bool
    parts: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The name of its module: the key without ``.weight``."""
        return self.key.removesuffix(".weight")

    def sibling(self, leaf: str) -> str:
        """Return the name on the hub of a tensor beside its weight."""
        return f"{self.name}.{leaf}" if self.key.endswith(".weight") else f"{self.key}_{leaf}"

    def member(self, expert: int, leaf: str) -> str:
        """Return the name of one expert's projection where experts are written one by one."""
        return self.head + self.family.linear.format(expert=expert, leaf=leaf)

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The names of all its projections, expert by expert."""
        return tuple(self.member(e, leaf) for e in range(self.shape[0]) for leaf in self.leaves)


@dataclass(frozen=True, slots=True)
class Region:
    """What of a stack's tensor one expert's tensor is."""

    tensor: Tensor
    runs: tuple[Run, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """Its shape as one expert's tensor."""
        left = [n for _, _, n, drop in self.runs if not drop]
        return tuple(left[i] for i in self.order)

    @property
    def offset(self) -> int | None:
        """Where it begins in its file, where it is one stretch of it; else None."""
        if self.order != tuple(sorted(self.order)):
            return None
        start, whole = (
            0,
            True,
        )  # from the last axis on: full axes, then one run, then single entries
        size = 1
        for (first, step, length, _), n in zip(
            reversed(self.runs), reversed(self.tensor.shape), strict=True
        ):
            if not whole and length != 1:
                return None
            if step != 1 and length > 1:
                return None
            whole = whole and length == n
            start, size = start + first * size, size * n
        return self.tensor.offset + start * (DTYPE_BITS[self.tensor.dtype] // 8)


@dataclass(frozen=True)
class Stacks:
    """The stacks of a checkpoint, and each expert's tensors as regions of theirs."""

    family: Family
    stacks: tuple[Stack, ...]
    regions: Mapping[str, Region]

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all tensors of stacks."""
        return frozenset(t.name for s in self.stacks for t in s.parts.values())

    def groups(self) -> Iterator[tuple[Stack, ...]]:
        """Yield what shares its scales: the stacks of gate and up of a layer, and that of down."""
        layers: dict[tuple[str, bool], list[Stack]] = {}
        for stack in self.stacks:
            layers.setdefault((stack.head, _is_down(stack)), []).append(stack)
        yield from (tuple(g) for g in layers.values())


def _is_down(stack: Stack) -> bool:
    return stack.leaves in (("down_proj",), ("w2",))


def read_stacks(ckpt: Checkpoint, config: Mapping[str, Any] | None = None) -> Stacks | None:
    """Return the stacks of a checkpoint, or None where its family keeps none or has none here.

    Args:
        ckpt: in hub layout; its stacks may be unquantized, MXFP4, or quantized as they are written
            here.
        config: where the checkpoint has no config.json yet.

    Raises:
        PlanError: a family that is refused, or stacks that contradict its row.
        UnsupportedConversion: a tensor beside a stack that has no meaning there.
    """
    family = family_of(config if config is not None else ckpt.config)
    if family is None:
        return None
    tensors = ckpt.tensors
    if family.refused:
        odd = next((n for n in tensors if n.endswith(tuple(f".{x}" for x in family.names))), None)
        if odd is not None:
            raise PlanError(f"{odd}: {family.name} is not exported: {family.refused}")
        return None
    found: list[Stack] = []
    for head, suffixes in _heads(family, tensors).items():
        found += _of_layer(family, head, suffixes, tensors, str(ckpt.uri))
    if not found:
        return None
    plain = [s for s in found if "blocks" not in s.parts]
    packed = [s for s in found if "blocks" in s.parts]
    regions: dict[str, Region] = {}
    for some in (plain, packed):
        layout = _layout(family, some)
        for stack in some:
            regions |= _regions(layout, stack)
    return Stacks(family, tuple(found), regions)


def _heads(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Return by prefix which of the family's stacks is there, by the leaf that its weight has (''
    or ``blocks``).
    """
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        for suffix in family.stacks:
            for leaf in ("", "_blocks"):
                if name.endswith(f".{suffix}{leaf}"):
                    found.setdefault(name.removesuffix(f"{suffix}{leaf}"), {})[suffix] = leaf
    return found


def _of_layer(
    family: Family, head: str, there: Mapping[str, str], tensors: Mapping[str, Tensor], uri: str
) -> list[Stack]:
    missing = [f"{head}{s}" for s in family.stacks if s not in there]
    if missing:
        raise PlanError(
            f"{uri}: {missing[0]} is missing beside {head}{next(iter(there))} ({family.name})"
        )
    parts = {s: _parts(f"{head}{s}", tensors) for s in family.stacks}
    packed = {s for s in parts if "blocks" in parts[s]}
    if packed and len(packed) != len(parts):
        raise PlanError(
            f"{uri}: {head}{sorted(packed)[0]} is MXFP4 and the other stacks of its layer are not"
        )
    readings = (
        [False]
        if packed
        else {"out_in": [False], "in_out": [True], "either": [False, True]}[family.axes]
    )
    for turned in readings:
        shapes = {s: _logical(parts[s], turned) for s in parts}
        if _consistent(family, shapes):
            written = turned if family.axes == "either" else family.axes == "in_out"
            return [
                Stack(
                    family,
                    f"{head}{s}",
                    head,
                    family.stacks[s],
                    cast(Any, shapes[s]),
                    turned,
                    written,
                    parts[s],
                )
                for s in family.stacks
            ]
    said = ", ".join(
        f"{s} {list((parts[s].get('blocks') or parts[s]['weight']).shape)}" for s in parts
    )
    wanted = _AXES[family.axes]
    raise PlanError(f"{uri}: {head}: {said} are no stacks {wanted}, which {family.name} has")


def _parts(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"weight": tensors[key]} if key in tensors else {}
    for leaf in (*sorted(SIBLINGS - {"weight"}), *_CODES):
        base = (
            key.removesuffix(".weight") + "."
            if key.endswith(".weight") and leaf not in _CODES
            else f"{key}_"
        )
        if f"{base}{leaf}" in tensors:
            found[leaf] = tensors[f"{base}{leaf}"]
    return found


def _logical(parts: Mapping[str, Tensor], turned: bool) -> tuple[int, int, int] | None:
    """Return (experts, out, in) of a stack under a reading, in elements."""
    tensor = parts.get("blocks") or parts["weight"]
    if "blocks" in parts:
        return (
            (tensor.shape[0], tensor.shape[1], tensor.shape[2] * 32)
            if len(tensor.shape) == 4
            else None
        )
    if len(tensor.shape) != 3:
        return None
    experts, out, in_ = (
        (tensor.shape[0], tensor.shape[2], tensor.shape[1]) if turned else tensor.shape
    )
    return experts, out, in_ * (2 if tensor.dtype == "U8" else 1)


def _consistent(family: Family, shapes: Mapping[str, tuple[int, int, int] | None]) -> bool:
    """Whether the stacks of a layer fit one another: gate and up lead into what down leads out
    of.
    """
    known = {s: v for s, v in shapes.items() if v is not None}
    if len(known) != len(family.stacks) or len({v[0] for v in known.values()}) != 1:
        return False
    (down,) = (
        known[s] for s, leaves in family.stacks.items() if leaves in (("down_proj",), ("w2",))
    )
    first = [(v, len(family.stacks[s])) for s, v in known.items() if v is not down]
    fit = all(out == n * down[2] and in_ == down[1] for (_, out, in_), n in first)
    return fit and min(down) > 0 and down[0] <= MAX_EXPERTS


def _layout(family: Family, stacks: list[Stack]) -> Layout:
    """Return the proved layout of stacks as grids of single experts' weights."""
    memory: dict[str, Grid] = {}
    hub: dict[str, Shape] = {}
    for stack in stacks:
        experts, out, in_ = stack.shape
        count = len(stack.leaves)
        rows, columns = (2, 1) if stack.turned else (1, 2)
        pieces = []
        for e in range(experts):
            for k, leaf in enumerate(stack.leaves):
                name, size = f"{stack.member(e, leaf)}.weight", out // count
                hub[name] = (size, in_)
                start, step = (k, count) if family.interleaved else (k * size, 1)
                axes = (Axis(0, rows, size, start=start, step=step), Axis(1, columns, in_))
                pieces.append(Piece(name, (Axis(None, 0, 1, start=e), *axes)))
        memory[stack.key] = Grid(
            (experts, in_, out) if stack.turned else (experts, out, in_), tuple(pieces)
        )
    return Layout(family.name, memory, hub, frozenset(s.key for s in stacks if s.turned)).prove()


def _regions(layout: Layout, stack: Stack) -> dict[str, Region]:
    found: dict[str, Region] = {}
    for leaf, tensor in stack.parts.items():
        if leaf in _CODES:
            for p in layout.memory[stack.key].pieces:
                _, rows, _ = p.axes
                runs = [(p.axes[0].start, 1, 1, True), (rows.start, rows.step, rows.length, False)]
                runs += [(0, 1, n, False) for n in tensor.shape[2:]]
                found[f"{p.hub}_{leaf}"] = Region(tensor, tuple(runs), tuple(range(len(runs) - 1)))
            continue
        named = stack.key if leaf == "weight" else stack.sibling(leaf)
        for part in layout.parts(named, tensor.shape):
            found[part.hub] = Region(
                tensor, tuple(map(_run, part.transfer.memory)), part.transfer.order
            )
    return found


def _run(cut: Cut) -> Run:
    return cut.start, cut.step, cut.length, cut.drop


class StackSource(DerivedSource):
    """A checkpoint's source with each expert's tensors in it as files of their own."""

    def __init__(self, raw: Checkpoint, regions: Mapping[str, Region]) -> None:
        super().__init__(raw.source)
        self._raw, self._regions = raw, regions
        self._last = threading.local()  # a large tensor is read in pieces

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return bytes of a file, or of one expert's tensor."""
        if name not in self._regions:
            return self.inner.read(name, offset, length)
        if getattr(self._last, "name", None) != name:
            self._last.raw, self._last.name = (
                self._cut(self._regions[name]).reshape(-1).view(np.uint8),
                name,
            )
        found: Bytes = self._last.raw[offset : offset + length]
        return found

    def _cut(self, region: Region) -> npt.NDArray[Any]:
        """Return what a region holds; an expert's slab is kept for the next of its projections."""
        t, runs = region.tensor, region.runs
        if not runs or not runs[0][3] or DTYPE_BITS[t.dtype] % 8:
            return read_region(self._raw, t, runs, region.order)
        key = (t.name, runs[0][0])
        if getattr(self._last, "slab", None) is None or self._last.slab != key:
            size = t.nbytes // t.shape[0]
            self._last.data, self._last.slab = (
                self.inner.read(t.file, t.offset + runs[0][0] * size, size),
                key,
            )
        width = DTYPE_BITS[t.dtype] // 8
        return cut(self._last.data.view(f"u{width}").reshape(t.shape[1:]), runs[1:], region.order)

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` with bytes of a file, or of one expert's tensor."""
        if name in self._regions:
            out[:] = self.read(name, offset, out.size)
        else:
            self.inner.read_into(name, offset, out)


@dataclass(frozen=True)
class Unstacked(Checkpoint):
    """A checkpoint whose experts' tensors stand one by one; ``raw`` is it as it is on disk."""

    raw: Checkpoint
    stacks: Stacks

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in file order, a stack's replaced by those of its experts."""
        of: dict[str, list[str]] = {}
        for name, region in self.stacks.regions.items():
            of.setdefault(region.tensor.name, []).append(name)
        found: dict[str, Tensor] = {}
        for name, tensor in self.raw.tensors.items():
            if name not in of:
                found[name] = tensor
                continue
            for each in of[name]:
                found[each] = _cut_out(each, self.stacks.regions[each])
        return MappingProxyType(found)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors on disk."""
        return self.raw.nbytes


def _cut_out(name: str, region: Region) -> Tensor:
    t, shape = region.tensor, region.shape
    nbytes = math.prod(shape) * DTYPE_BITS[t.dtype] // 8
    offset = region.offset
    if offset is not None:
        return Tensor(name, t.dtype, shape, t.file, offset, nbytes)
    return Tensor(name, t.dtype, shape, name, 0, nbytes)


def unstacked(ckpt: Checkpoint, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Return a checkpoint with the experts of its stacks one by one; itself where its family has
    none.

    Raises:
        PlanError: as `read_stacks`.
    """
    stacks = read_stacks(ckpt, config)
    if stacks is None:
        return ckpt
    own: dict[str, Any] = {f.name: getattr(ckpt, f.name) for f in fields(Checkpoint)}
    return Unstacked(**own | {"source": StackSource(ckpt, stacks.regions)}, raw=ckpt, stacks=stacks)
