# SPDX-License-Identifier: Apache-2.0
"""Experts that a family's hub layout holds in stacks, read as what engines build of them: each
expert's linear layers.

``expert_stacks.toml`` states for each family, as transformers 5.23 computes with them, which tensor
holds which projections and along which axes. A checkpoint may hold its experts in stacks or
individually; `unstacked` gives both the same view, so that a check compares either with either, and
an export writes either from either.
"""

from __future__ import annotations

import math
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from verifier.checkpoint import NUMPY_DTYPES, Bytes, Checkpoint, Source, Tensor
from verifier.checkpoint.source import DerivedSource
from verifier.schemes.declared import Declaration
from verifier.schemes.engines import Engine
from verifier.schemes.modules import LEAVES

Shape = tuple[int, ...]
MAX_SLICES = 1_000_000
"""The most tensors of single experts that a view has."""
MAX_EXPERTS = 10_000
MLX_STACK = ".switch_mlp."
"""What mlx-lm names the experts that it stacks."""
_CODES = ("blocks", "scales")
"""The leaves of MXFP4, ``<parameter>_blocks`` and ``<parameter>_scales``."""
_DOWN = (("down_proj",), ("w2",))
_AXES = {
    False: "[experts, out, in]",
    True: "[experts, in, out]",
    None: "[experts, out, in] or [experts, in, out]",
}
_VIRTUAL = 1 << 60
"""Offsets from here on are not in a file: each 2^40 of them is a slice that is not contiguous."""
_SLICE_BITS = 40


Form = Literal["per-expert", "hub"]
"""How experts are stored: individually, or in stacks as the hub has them."""


@dataclass(frozen=True, slots=True)
class EngineForms:
    """The forms in which an engine loads the quantized experts of a family.

    Attributes:
        layouts: the forms, the best first; none where it loads no quantized experts.
        why: the reason that it loads no others.
        source: where this was read.
        partly: forms that it loads of some formats or model classes only.
    """

    layouts: tuple[Form, ...]
    why: str
    source: str
    partly: tuple[Form, ...] = ()


@dataclass(frozen=True, slots=True)
class StackLayout:
    """How a family stacks experts; a table of ``expert_stacks.toml``.

    Attributes:
        name: of the family, for messages.
        model_types: of its config.json or text_config.
        stacks: by tensor name after the layer's prefix, the projections that it holds, in order.
        linear: the name of one expert's projection after the layer's prefix, with ``{expert}`` and
            ``{leaf}``.
        transposed: whether weights are [experts, in, out], not [experts, out, in]; None: either.
        interleaved: whether gate and up alternate row by row instead of following one another.
        one_scale: whether a written stack has one global scale, not one per expert.
        default: how an export writes the experts by default.
        why: the reason for that default.
        source: where it was read.
        refused: why the exporter refuses the family, '' where it does not.
        refused_names: the tensors, after the layer's prefix, that show a refused layout.
        engines: how engines load its quantized experts, where that is known.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: Mapping[str, tuple[str, ...]]
    linear: str
    transposed: bool | None
    interleaved: bool
    one_scale: bool
    default: Form
    why: str
    source: str
    refused: str
    refused_names: tuple[str, ...]
    engines: Mapping[Engine, EngineForms] = field(default_factory=dict)

    def expert_linear(self, head: str, expert: int, leaf: str) -> str:
        """Return the name of one expert's projection; ``head`` is the layer's prefix."""
        return head + self.linear.format(expert=expert, leaf=leaf)


@cache
def stack_layouts() -> tuple[StackLayout, ...]:
    """Return the families whose hub layout stacks experts, in the order of the file."""
    file = resources.files("verifier.layouts") / "expert_stacks.toml"
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    transposed = {"out_in": False, "in_out": True, "either": None}
    return tuple(
        StackLayout(
            name=name,
            model_types=tuple(table["model_types"]),
            stacks={key: tuple(leaves) for key, leaves in table.get("stacks", {}).items()},
            linear=table.get("linear", ""),
            transposed=transposed[table.get("axes", "out_in")],
            interleaved=table.get("order") == "interleaved",
            one_scale=table.get("scales") == "one",
            default=table.get("default", "per-expert"),
            why=table.get("why", ""),
            source=table.get("source", ""),
            refused=table.get("refused", ""),
            refused_names=tuple(table.get("refused_names", ())),
            engines={
                engine: EngineForms(
                    tuple(forms["layouts"]),
                    forms["why"],
                    forms["source"],
                    tuple(forms.get("partly", ())),
                )
                for engine, forms in table.get("engines", {}).items()
            },
        )
        for name, table in tables.items()
    )


@cache
def _by_model_type() -> Mapping[str, StackLayout]:
    return {kind: layout for layout in stack_layouts() for kind in layout.model_types}


def stack_layout_of(config: Mapping[str, Any] | None) -> StackLayout | None:
    """Return how the family of a config.json, or of its text_config, stacks experts; None where it
    does not.
    """
    top = config or {}
    text = top.get("text_config")
    known = _by_model_type()
    for node in (top, text if isinstance(text, Mapping) else {}):
        model_type = node.get("model_type")
        if isinstance(model_type, str) and model_type in known:
            return known[model_type]
    return None


@dataclass(frozen=True, eq=False)
class StoredStack:
    """One stack of a layer: some projections of all its experts.

    Attributes:
        layout: how its family stacks experts.
        head: the layer's prefix.
        suffix: the rest of the name of its weight, without MXFP4's suffix.
        shape: (experts, out, in) in elements, all its projections together.
        transposed: whether its weight is [experts, in, out] here (MXFP4 never is).
        tensors: its tensors by leaf: ``weight`` or ``blocks``, and their siblings.
    """

    layout: StackLayout
    head: str
    suffix: str
    shape: tuple[int, int, int]
    transposed: bool
    tensors: Mapping[str, Tensor]

    @property
    def key(self) -> str:
        """The name of its weight, without MXFP4's suffix."""
        return self.head + self.suffix

    @property
    def name(self) -> str:
        """The name of its module: the key without ``.weight``."""
        return self.key.removesuffix(".weight")

    @property
    def leaves(self) -> tuple[str, ...]:
        """The projections that it holds, in order."""
        return self.layout.stacks[self.suffix]

    @property
    def is_down(self) -> bool:
        """Whether it holds the down projections."""
        return self.leaves in _DOWN

    @property
    def hub_transposed(self) -> bool:
        """Whether the hub has its weight [experts, in, out] where it is not MXFP4."""
        transposed = self.layout.transposed
        return self.transposed if transposed is None else transposed

    def sibling(self, leaf: str) -> str:
        """Return the name of a tensor next to its weight."""
        return f"{self.name}.{leaf}" if self.key.endswith(".weight") else f"{self.key}_{leaf}"

    def linear(self, expert: int, leaf: str) -> str:
        """Return the name of one expert's projection."""
        return self.layout.expert_linear(self.head, expert, leaf)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The names of all its projections, expert by expert."""
        return tuple(self.linear(e, leaf) for e in range(self.shape[0]) for leaf in self.leaves)

    def slices(self, leaf: str) -> list[StackSlice]:
        """Return what each of `linears` has of a tensor; none where its shape has no meaning."""
        tensor, experts, count = self.tensors[leaf], self.shape[0], len(self.leaves)
        shared = tensor.shape in ((), (1,)) or leaf == "pre_quant_scale"
        if tensor.dtype not in NUMPY_DTYPES:
            return []
        if shared:
            return [StackSlice(tensor, None)] * len(self.linears)
        if not tensor.shape or tensor.shape[0] != experts:
            return []
        transposed = self.transposed and len(tensor.shape) == 3
        if math.prod(tensor.shape[1:]) == 1:
            return [StackSlice(tensor, e) for e in range(experts) for _ in self.leaves]
        axis = 1 if transposed else 0
        rows = tensor.shape[1 + axis]
        if rows % count:
            return []
        size = rows // count
        slices = []
        for expert in range(experts):
            for i in range(count):
                first, step = (i, count) if self.layout.interleaved else (i * size, 1)
                slices.append(StackSlice(tensor, expert, axis, first, step, size, transposed))
        return slices


class StackSlice(NamedTuple):
    """What one projection of one expert has of a stack's tensor.

    ``expert`` None is the whole tensor. ``axis`` None is the expert's slab as it is; else every
    ``step``-th entry along ``axis`` of the slab, ``size`` of them from ``first``, its two axes then
    swapped where ``transposed``.
    """

    tensor: Tensor
    expert: int | None
    axis: int | None = None
    first: int = 0
    step: int = 1
    size: int = 0
    transposed: bool = False

    @property
    def slab(self) -> tuple[str, int, int]:
        """File, offset and length of the bytes that it is cut from."""
        t = self.tensor
        if self.expert is None:
            return t.file, t.offset, t.nbytes
        size = t.nbytes // max(1, t.shape[0])
        return t.file, t.offset + self.expert * size, size

    def cut(self, slab: Bytes) -> Bytes:
        """Return its bytes, contiguous, from those of the slab."""
        if self.expert is None:
            return slab
        width = self.tensor.nbytes // max(1, self.tensor.elements)
        values = slab.view(f"u{width}").reshape(self.tensor.shape[1:])
        if self.axis is not None:
            entries = slice(self.first, self.first + self.step * self.size, self.step)
            values = values[(slice(None),) * self.axis + (entries,)]
        values = values.T if self.transposed else values
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def as_tensor(self, name: str, number: int) -> Tensor:
        """Return it as a tensor of its own, at its place in the file where it is one stretch of it.

        Args:
            name: of the tensor.
            number: which of the slices that are not contiguous it would be.
        """
        t = self.tensor
        if self.expert is None:
            return t._replace(name=name)
        _, offset, nbytes = self.slab
        shape = list(t.shape[1:])
        contiguous = self.axis is None or (self.axis == 0 and self.step == 1)
        if self.axis is not None:
            row = nbytes // (shape[self.axis] or 1)
            nbytes, shape[self.axis] = row * self.size, self.size
            if self.axis == 0:
                offset += self.first * row
        if self.transposed:
            shape.reverse()
            contiguous = contiguous and min(shape) == 1
        if not contiguous:
            offset = _VIRTUAL + (number << _SLICE_BITS)
        return Tensor(name, t.dtype, tuple(shape), t.file, offset, nbytes)


def _stack_tensor(name: str, layout: StackLayout) -> tuple[str, str, str] | None:
    """Return (layer's prefix, stack, leaf) of a stack's tensor; None for any other tensor."""
    for suffix in layout.stacks:
        head, match, tail = name.rpartition(f".{suffix.removesuffix('.weight')}")
        if not match:
            continue
        leaf = tail[1:]
        if suffix.endswith(".weight"):
            if tail.startswith(".") and leaf in LEAVES:
                return f"{head}.", suffix, leaf
        elif not tail:
            return f"{head}.", suffix, "weight"
        if tail.startswith("_") and leaf != "weight" and (leaf in LEAVES or leaf in _CODES):
            return f"{head}.", suffix, leaf
    return None


class StackSearch(NamedTuple):
    """The stacks of a checkpoint, and why other layers are not read as stacks, one reason each."""

    stacks: tuple[StoredStack, ...]
    misfits: tuple[str, ...]


def find_stacks(checkpoint: Checkpoint) -> StackSearch:
    """Return the stacks of experts of a checkpoint, layer by layer, in file order."""
    layout = stack_layout_of(checkpoint.config) or _mlx_layout(checkpoint)
    if layout is None:
        return StackSearch((), ())
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in checkpoint.tensors.items():
        place = _stack_tensor(name, layout)
        if place is not None:
            head, suffix, leaf = place
            layers.setdefault(head, {}).setdefault(suffix, {})[leaf] = tensor
    stacks: list[StoredStack] = []
    misfits: list[str] = []
    slices = 0
    for head, tensors in layers.items():
        layer = _stacks_of_layer(layout, head, tensors)
        if isinstance(layer, str):
            misfits.append(layer)
            continue
        slices += sum(len(s.linears) * len(s.tensors) for s in layer)
        if slices > MAX_SLICES:
            return StackSearch((), (f"more than {MAX_SLICES:,} tensors of single experts",))
        stacks += layer
    return StackSearch(tuple(stacks), tuple(misfits))


def _mlx_layout(checkpoint: Checkpoint) -> StackLayout | None:
    """Return how mlx-lm stacks the experts of families that the hub stores one by one."""
    if not any(MLX_STACK in name for name in checkpoint.tensors):
        return None
    leaves = ("gate_proj", "up_proj", "down_proj")
    return StackLayout(
        "mlx",
        (),
        {f"mlp{MLX_STACK}{leaf}.weight": (leaf,) for leaf in leaves},
        "mlp.experts.{expert}.{leaf}",
        transposed=False,
        interleaved=False,
        one_scale=False,
        default="per-expert",
        why="",
        source="mlx-lm 0.32 models/switch_layers.py",
        refused="",
        refused_names=(),
    )


def _stacks_of_layer(
    layout: StackLayout, head: str, tensors: Mapping[str, Mapping[str, Tensor]]
) -> list[StoredStack] | str:
    """Return the stacks of a layer, or why its tensors are not what the family has."""
    weights = {s: t.get("weight", t.get("blocks")) for s, t in tensors.items()}
    present = {suffix: w for suffix, w in weights.items() if w is not None}
    if not present:
        return []
    missing = [suffix for suffix in layout.stacks if suffix not in present]
    if missing:
        other = next(iter(present.values()))
        return f"{head}{missing[0]} is missing next to {other.name} ({layout.name})"
    mxfp4 = any("blocks" in tensors[suffix] for suffix in layout.stacks)
    readings = (False, True) if layout.transposed is None else (layout.transposed,)
    for transposed in (False,) if mxfp4 else readings:  # MXFP4 is [experts, out, in] everywhere
        sizes = {s: _logical_size(present[s], transposed) for s in layout.stacks}
        # The widths of packed words are not known here, and MXFP4 has one reading: rules compare
        # each expert with the config's sizes.
        packed = mxfp4 or all(w.dtype == "U32" for w in present.values())
        if (_alike if packed else _fits)(layout, sizes):
            return [
                StoredStack(layout, head, s, size, transposed, tensors[s])
                for s, size in sizes.items()
                if size is not None
            ]
    shapes = ", ".join(f"{s} {list(present[s].shape)}" for s in layout.stacks)
    axes = _AXES[False if mxfp4 else layout.transposed]
    return f"{head}: {shapes} are not stacks {axes}, which {layout.name} has"


def _logical_size(weight: Tensor, transposed: bool) -> tuple[int, int, int] | None:
    """Return (experts, out, in) of a stack in elements, or None where it is not a stack."""
    if len(weight.shape) == 4 and weight.dtype == "U8":
        return weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3] * 2
    if len(weight.shape) != 3:
        return None
    experts, out, in_ = (weight.shape[0], *weight.shape[:0:-1]) if transposed else weight.shape
    return experts, out, in_ * (2 if weight.dtype == "U8" else 1)


def _alike(layout: StackLayout, sizes: Mapping[str, tuple[int, int, int] | None]) -> bool:
    """Whether the stacks of a layer have as many experts, and rows for all projections."""
    known = {suffix: size for suffix, size in sizes.items() if size is not None}
    counts = {experts for experts, _, _ in known.values()}
    if len(known) != len(sizes) or len(counts) != 1 or not 0 < min(counts) <= MAX_EXPERTS:
        return False
    return all(out % len(layout.stacks[suffix]) == 0 for suffix, (_, out, _) in known.items())


def _fits(layout: StackLayout, sizes: Mapping[str, tuple[int, int, int] | None]) -> bool:
    """Whether the stacks of a layer fit one another: down reads what gate and up write."""
    known = {suffix: size for suffix, size in sizes.items() if size is not None}
    counts = {experts for experts, _, _ in known.values()}
    if len(known) != len(sizes) or len(counts) != 1 or not 0 < min(counts) <= MAX_EXPERTS:
        return False
    (down,) = (suffix for suffix, leaves in layout.stacks.items() if leaves in _DOWN)
    _, hidden, intermediate = known.pop(down)
    return all(
        (out, in_) == (len(layout.stacks[suffix]) * intermediate, hidden)
        for suffix, (_, out, in_) in known.items()
    )


class StackSource(DerivedSource):
    """A source in which an offset from `_VIRTUAL` on means a slice of a stack.

    Each thread keeps the slice and the slab that it read last.
    """

    def __init__(self, inner: Source, slices: Mapping[int, StackSlice]) -> None:
        super().__init__(inner)
        self._slices = slices
        self._last = threading.local()

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return ``length`` bytes of ``name`` from ``offset``, or of a slice."""
        if offset < _VIRTUAL:
            return self.inner.read(name, offset, length)
        number, start = divmod(offset - _VIRTUAL, 1 << _SLICE_BITS)
        if getattr(self._last, "number", None) != number:
            cut = self._slices[number]
            self._last.data, self._last.number = cut.cut(self._slab(cut)), number
        data: Bytes = self._last.data[start : start + length]
        return data

    def _slab(self, cut: StackSlice) -> Bytes:
        """Return an expert's slab; gate and up are cut from the same one, one after the other."""
        if getattr(self._last, "slab", None) != cut.slab:
            self._last.slab_data, self._last.slab = self.inner.read(*cut.slab), cut.slab
        data: Bytes = self._last.slab_data
        return data

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` with bytes of ``name`` from ``offset``, or of a slice."""
        if offset < _VIRTUAL:
            self.inner.read_into(name, offset, out)
        else:
            out[:] = self.read(name, offset, out.size)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announce reads; for a slice, the slab that it is cut from."""
        self.inner.expect(self._in_file(ranges))

    def _in_file(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
        last = None
        for name, offset, length in ranges:
            if offset < _VIRTUAL:
                yield name, offset, length
                continue
            slab = self._slices[(offset - _VIRTUAL) >> _SLICE_BITS].slab
            if slab != last:
                yield slab
            last = slab


@dataclass(frozen=True)
class UnstackedCheckpoint(Checkpoint):
    """A checkpoint whose experts' tensors are read individually.

    Attributes:
        raw: the checkpoint as it is stored.
        stacks: its stacks.
        view: every tensor by name, a stack's replaced by those of its experts.
        stacked: by name of an expert's tensor, that of the stack's tensor that it is a slice of.
    """

    raw: Checkpoint
    stacks: tuple[StoredStack, ...]
    view: Mapping[str, Tensor]
    stacked: Mapping[str, str]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in file order, a stack's replaced by those of its experts."""
        return MappingProxyType(dict(self.view))

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """The linear layers of each stack, by the name of the stack's module."""
        return {stack.name: stack.linears for stack in self.stacks}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as they are stored."""
        return self.raw.nbytes


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the experts of its stacks as single tensors; itself where it has no
    known stacks.

    A stack whose shape does not fit its family, or a sibling of it whose shape has no meaning,
    stays as it is.
    """
    return unstacked_view(checkpoint, find_stacks(checkpoint).stacks)


def unstacked_view(checkpoint: Checkpoint, stacks: tuple[StoredStack, ...]) -> Checkpoint:
    """Return a checkpoint with the experts of these stacks as single tensors."""
    by_tensor: dict[str, list[tuple[str, StackSlice]]] = {}
    for stack in stacks:
        for leaf, tensor in stack.tensors.items():
            mxfp4 = leaf in _CODES and "blocks" in stack.tensors
            suffix = f"weight_{leaf}" if mxfp4 else leaf
            names = (f"{linear}.{suffix}" for linear in stack.linears)
            slices = stack.slices(leaf)
            if slices:
                by_tensor[tensor.name] = list(zip(names, slices, strict=True))
    if not by_tensor:
        return checkpoint
    view: dict[str, Tensor] = {}
    virtual: dict[int, StackSlice] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in by_tensor:
            view[name] = tensor
        for part, cut in by_tensor.get(name, ()):
            view[part] = cut.as_tensor(part, len(virtual))
            if view[part].offset >= _VIRTUAL:
                virtual[len(virtual)] = cut
    stored: dict[str, Any] = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    stored["source"] = StackSource(checkpoint.source, virtual)
    stacked = {part: name for name, parts in by_tensor.items() for part, _ in parts}
    return UnstackedCheckpoint(**stored, raw=checkpoint, stacks=stacks, view=view, stacked=stacked)


def file_offset(offset: int) -> int | None:
    """Return an offset in a file, or None for that of a slice that is not contiguous."""
    return offset if offset < _VIRTUAL else None


def split_shapes(
    shapes: Mapping[str, Shape | None], config: Mapping[str, Any] | None
) -> dict[str, Shape | None]:
    """Return names and logical shapes with stacks replaced by each expert's linear layers.

    A stack of unknown shape is left out: its number of experts is not known.
    """
    layout = stack_layout_of(config)
    if layout is None:
        return dict(shapes)
    result: dict[str, Shape | None] = {}
    for name, shape in shapes.items():
        place = _stack_tensor(name, layout)
        if place is None:
            result[name] = shape
            continue
        head, suffix, leaf = place
        if shape is None or leaf not in ("weight", "bias"):
            continue
        leaves = layout.stacks[suffix]
        inner = shape[:0:-1] if layout.transposed and leaf == "weight" else shape[1:]
        too_many = shape[0] > MAX_EXPERTS or len(result) > MAX_SLICES
        if too_many or not inner or inner[0] % len(leaves):
            continue
        own = (inner[0] // len(leaves), *inner[1:])
        for expert in range(shape[0]):
            for projection in leaves:
                result[f"{layout.expert_linear(head, expert, projection)}.{leaf}"] = own
    return result


class Restacked(NamedTuple):
    """A stack that the tensors of single experts make: its name on the hub, the leaf (``weight`` or
    ``bias``), its projections, and the names of its parts, expert by expert.
    """

    name: str
    leaf: str
    projections: tuple[str, ...]
    parts: tuple[str, ...]


def restacked(names: Iterable[str], config: Mapping[str, Any] | None) -> list[Restacked]:
    """Return the stacks that weights and biases of single experts make, those that are complete.

    Args:
        names: of weights and biases, experts as single tensors.
        config: of the checkpoint.
    """
    layout = stack_layout_of(config)
    if layout is None or not layout.stacks:
        return []
    container = layout.linear.partition("{")[0]
    layers: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        before, _, number = parent.rpartition(".")
        is_expert = number.isdecimal() and len(number) < 8
        if is_expert and leaf in ("weight", "bias") and f"{before}.".endswith(f".{container}"):
            head = f"{before}.".removesuffix(container)
            layers.setdefault((head, leaf), {})[int(number), projection] = name
    stacks = []
    for (head, leaf), parts in layers.items():
        experts = 1 + max(expert for expert, _ in parts)
        for suffix, projections in layout.stacks.items():
            members = [(e, p) for e in range(min(experts, len(parts))) for p in projections]
            present = tuple(parts[key] for key in members if key in parts)
            if present and len(present) == experts * len(projections):
                key = f"{head}{suffix}" if leaf == "weight" else f"{head}{suffix}_bias"
                stacks.append(Restacked(key, leaf, projections, present))
    return stacks


def expanded(declaration: Declaration | None, checkpoint: Checkpoint) -> Declaration | None:
    """Return a declaration with each entry for a stack replaced by entries for its linear
    layers.
    """
    if declaration is None or not isinstance(checkpoint, UnstackedCheckpoint):
        return declaration
    modules = checkpoint.modules
    layers = {
        linear: entry
        for name, entry in declaration.layers.items()
        for linear in modules.get(name, (name,))
    }
    exclude = [linear for name in declaration.exclude for linear in modules.get(name, (name,))]
    if layers == declaration.layers and exclude == list(declaration.exclude):
        return declaration
    return replace(declaration, layers=layers, exclude=tuple(dict.fromkeys(exclude)))
