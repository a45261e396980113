# SPDX-License-Identifier: Apache-2.0
"""Experts that a family's hub layout holds in stacks, judged as what engines build of them: each
expert's linear layers.

`STACKINGS` says of each family, as transformers 5.23 computes with them, which tensor holds which
projections and along which axes. A checkpoint may hold its experts in stacks or one by one;
`unstacked` lets both be read alike, so that either can be judged, and against either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from verifier.checkpoint import NUMPY_DTYPES, Bytes, Checkpoint, Source, Tensor
from verifier.checkpoint.source import DerivedSource
from verifier.schemes.declarations import Declaration
from verifier.schemes.modules import LEAVES

Shape = tuple[int, ...]
MAX_PARTS = 1_000_000
"""The most tensors that stacks are taken apart into."""
MAX_EXPERTS = 10_000
_FAR = 1 << 60
"""Where the offsets begin that mean no place in a file: a part that is no single stretch of it."""


@dataclass(frozen=True, slots=True)
class Stacking:
    """How a family stacks experts.

    ``stacks`` maps a tensor's name behind its layer to the projections that it holds in order;
    ``linear`` is what a projection of one expert is called; ``turned`` that weights are [experts,
    in, out] (None: either), not [experts, out, in]; ``woven`` that projections alternate row by row
    and do not follow one another.
    """

    stacks: Mapping[str, tuple[str, ...]]
    linear: str
    turned: bool | None = False
    woven: bool = False


_GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _under(container: str, turned: bool | None = False, woven: bool = False) -> Stacking:
    return Stacking(
        {f"{container}.{k}": v for k, v in _GATE_UP.items()},
        f"{container}.{{}}.{{}}",
        turned,
        woven,
    )


_ARIA = Stacking(
    {"mlp.experts.fc1.weight": ("gate_proj", "up_proj"), "mlp.experts.fc2.weight": ("down_proj",)},
    "mlp.experts.{}.{}",
    True,
)
_GRANITE = Stacking(
    {
        "block_sparse_moe.input_linear.weight": ("w1", "w3"),
        "block_sparse_moe.output_linear.weight": ("w2",),
    },
    "block_sparse_moe.experts.{}.{}",
)
_STEP = Stacking(
    {f"moe.{p}.weight": (p,) for p in ("gate_proj", "up_proj", "down_proj")}, "moe.experts.{}.{}"
)
STACKINGS: Mapping[str, Stacking] = {
    "aria": _ARIA,
    "aria_text": _ARIA,
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _under("experts")
    ),
    "gpt_oss": _under("mlp.experts", turned=True, woven=True),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    "granitemoe_swa": _under("block_sparse_moe.experts"),
    **dict.fromkeys(("llama4", "llama4_text"), _under("feed_forward.experts", turned=True)),
    **dict.fromkeys(
        ("hy_v4", "mistral4", "muse_spark", "muse_spark_text", "zaya"), _under("mlp.experts")
    ),
    "openai_privacy_filter": _under("mlp.experts", turned=True),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), _under("mlp.experts")),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), _under("mlp.experts", turned=None)),
    "step3p7": _STEP,
    "step3p5": _STEP,
}
"""By model_type; what is not here is judged as it is stored."""


class Part(NamedTuple):
    """What of a stack's tensor a projection of one expert has: from ``first``, every ``step``-th of
    ``size`` along ``axis`` of the expert's slab (axis None: the slab whole); ``turned`` where the
    slab's axes are swapped.
    """

    tensor: Tensor
    expert: int | None
    axis: int | None
    first: int
    step: int
    size: int
    turned: bool


def stacking_of(config: Mapping[str, Any] | None) -> Stacking | None:
    """Return how the family of a config.json, or of its text_config, stacks experts; None where it
    does not.
    """
    top = config or {}
    text = top.get("text_config")
    types = (top.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None)
    return next((STACKINGS[t] for t in types if isinstance(t, str) and t in STACKINGS), None)


def split_shapes(
    found: Mapping[str, Shape | None], config: Mapping[str, Any] | None
) -> dict[str, Shape | None]:
    """Return names and logical shapes with those of stacks replaced by those of each expert's
    linears.

    A stack of unknown shape is left out: how many experts it has is not known.
    """
    stacking = stacking_of(config)
    if stacking is None:
        return dict(found)
    result: dict[str, Shape | None] = {}
    for name, shape in found.items():
        place = _place(name, stacking)
        if place is None:
            result[name] = shape
            continue
        head, suffix, leaf = place
        if shape is None or leaf not in ("", "bias"):
            continue
        leaves = stacking.stacks[suffix]
        turned = bool(stacking.turned) and leaf == ""
        inner = shape[:0:-1] if turned else shape[1:]
        if not inner or inner[0] % len(leaves) or shape[0] > MAX_EXPERTS or len(result) > MAX_PARTS:
            continue
        for e in range(shape[0]):
            for each in leaves:
                own = f"{head}{stacking.linear.format(e, each)}.{leaf or 'weight'}"
                result[own] = (inner[0] // len(leaves), *inner[1:])
    return result


def _place(name: str, stacking: Stacking) -> tuple[str, str, str] | None:
    """Return (what stands before, which stack, the leaf beside it) of a stack's tensor, or None for
    any other.
    """
    for suffix in stacking.stacks:
        head, found, tail = name.rpartition(f".{suffix.removesuffix('.weight')}")
        if not found:
            continue
        if suffix.endswith(".weight"):
            if tail.startswith(".") and (tail[1:] in LEAVES):
                return f"{head}.", suffix, "" if tail == ".weight" else tail[1:]
        elif not tail:
            return f"{head}.", suffix, ""
        if tail.startswith("_") and tail[1:] in LEAVES | {"blocks", "scales"}:
            return f"{head}.", suffix, tail[1:]
    return None


class PartSource(DerivedSource):
    """A source in which an offset beyond `_FAR` means a part of a stack."""

    def __init__(self, inner: Source, parts: Mapping[int, Part]) -> None:
        super().__init__(inner)
        self._parts = parts
        self._last = threading.local()

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return ``length`` bytes of ``name`` from ``offset``, or of a part."""
        if offset < _FAR:
            return self.inner.read(name, offset, length)
        number, start = divmod(offset - _FAR, 1 << 40)
        if getattr(self._last, "number", None) != number:
            self._last.data, self._last.number = read_part(self.inner, self._parts[number]), number
        data: Bytes = self._last.data[start : start + length]
        return data

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` with bytes of ``name`` from ``offset``, or of a part."""
        if offset < _FAR:
            self.inner.read_into(name, offset, out)
        else:
            out[:] = self.read(name, offset, out.size)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announce reads; of a part, the expert's slab that it is cut from."""
        self.inner.expect(
            (name, offset, length) if offset < _FAR else slab_of(self._parts[(offset - _FAR) >> 40])
            for name, offset, length in ranges
        )


def slab_of(part: Part) -> tuple[str, int, int]:
    """Return file, offset and length of what is read for a part."""
    t = part.tensor
    if part.expert is None:
        return t.file, t.offset, t.nbytes
    size = t.nbytes // max(1, t.shape[0])
    return t.file, t.offset + part.expert * size, size


def read_part(source: Source, part: Part) -> Bytes:
    """Return the bytes of a part, contiguous."""
    slab = source.read(*slab_of(part))
    if part.expert is None:
        return slab
    t = part.tensor
    width = t.nbytes // max(1, t.elements)
    values = slab.view(f"u{width}").reshape(t.shape[1:])
    if part.axis is not None:
        at = slice(part.first, part.first + part.step * part.size, part.step)
        values = values[(slice(None),) * part.axis + (at,)]
    return np.ascontiguousarray(values.T if part.turned else values).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Unstacked(Checkpoint):
    """A checkpoint whose experts' tensors are read one by one; ``raw`` is it as it is stored.

    ``stacked`` names for each tensor of an expert the stack's that it is a part of, ``modules`` for
    each stack's module those of its experts.
    """

    raw: Checkpoint
    found: Mapping[str, Tensor]
    stacked: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in file order, a stack's replaced by those of its experts."""
        return MappingProxyType(dict(self.found))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as they are stored."""
        return self.raw.nbytes


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the experts of its stacks one by one; itself where it holds none
    that are known.

    A stack whose shape does not fit what its family has, or a tensor beside one that has no meaning
    there, stays as it is.
    """
    stacking = stacking_of(checkpoint.config)
    if stacking is None:
        return checkpoint
    stacks: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in checkpoint.tensors.items():
        place = _place(name, stacking)
        if place is not None:
            stacks.setdefault(place[0], {}).setdefault(place[1], {})[place[2]] = tensor
    parts: dict[str, Part] = {}
    modules: dict[str, tuple[str, ...]] = {}
    for head, layer in stacks.items():
        turned = _turned(stacking, layer)
        if turned is None or len(parts) > MAX_PARTS:
            continue
        for suffix, tensors in layer.items():
            leaves = stacking.stacks[suffix]
            experts = _weight(tensors).shape[0]
            linears = [
                f"{head}{stacking.linear.format(e, leaf)}"
                for e in range(experts)
                for leaf in leaves
            ]
            modules[f"{head}{suffix}".removesuffix(".weight")] = tuple(linears)
            for leaf, tensor in tensors.items():
                for linear, part in zip(
                    linears, _parts(tensor, leaf, experts, leaves, turned, stacking), strict=False
                ):
                    parts[f"{linear}.{_spelled(leaf)}"] = part
    if not parts or len(parts) > MAX_PARTS:
        return checkpoint
    return _view(checkpoint, parts, modules)


def _spelled(leaf: str) -> str:
    return {"": "weight", "blocks": "weight_blocks", "scales": "weight_scales"}.get(leaf, leaf)


def _weight(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[""] if "" in tensors else tensors["blocks"]


def _turned(stacking: Stacking, layer: Mapping[str, Mapping[str, Tensor]]) -> bool | None:
    """Return whether the weights of a layer are [experts, in, out]; None where they are not what
    the family has.
    """
    if set(layer) != set(stacking.stacks) or not all(
        "" in t or "blocks" in t for t in layer.values()
    ):
        return None
    if any("blocks" in t for t in layer.values()):
        readings: tuple[bool, ...] = (False,)
    else:
        readings = (False, True) if stacking.turned is None else (stacking.turned,)
    return next((t for t in readings if _fits(stacking, layer, t)), None)


def _fits(stacking: Stacking, layer: Mapping[str, Mapping[str, Tensor]], turned: bool) -> bool:
    sizes = {s: _size(_weight(t), turned) for s, t in layer.items()}
    counts = {s[0] if s is not None else 0 for s in sizes.values()}
    if len(counts) != 1 or not 0 < min(counts) <= MAX_EXPERTS:
        return False
    down = next(s for s, leaves in stacking.stacks.items() if leaves in (("down_proj",), ("w2",)))
    wanted = sizes[down]
    return wanted is not None and all(
        size is not None and size[1:] == (len(stacking.stacks[s]) * wanted[2], wanted[1])
        for s, size in sizes.items()
        if s != down
    )


def _size(weight: Tensor, turned: bool) -> tuple[int, int, int] | None:
    """Return (experts, out, in) of a stack in elements, or None where it is none."""
    if len(weight.shape) == 4 and weight.dtype == "U8":
        return weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3] * 2
    if len(weight.shape) != 3:
        return None
    experts, out, in_ = (weight.shape[0], *weight.shape[:0:-1]) if turned else weight.shape
    return experts, out, in_ * (2 if weight.dtype == "U8" else 1)


def _parts(
    tensor: Tensor,
    leaf: str,
    experts: int,
    leaves: tuple[str, ...],
    turned: bool,
    stacking: Stacking,
) -> Iterator[Part]:
    """Yield what of a tensor each linear has, expert by expert; nothing where its shape has no
    meaning.
    """
    if tensor.dtype not in NUMPY_DTYPES:
        return
    one = tensor.shape in ((), (1,)) or leaf == "pre_quant_scale"
    if not one and (not tensor.shape or tensor.shape[0] != experts):
        return
    swapped = turned and len(tensor.shape) == 3
    axis = (
        None if one or len(tensor.shape) < 2 or tensor.shape[1:] == (1,) else (1 if swapped else 0)
    )
    rows = tensor.shape[1 + axis] if axis is not None else 0
    if axis is not None and rows % len(leaves):
        return
    count = rows // len(leaves)
    for e in range(experts):
        for k in range(len(leaves)):
            first, step = (k, len(leaves)) if stacking.woven else (k * count, 1)
            yield Part(tensor, None if one else e, axis, first, step, count, swapped)


def _view(
    checkpoint: Checkpoint, parts: Mapping[str, Part], modules: Mapping[str, tuple[str, ...]]
) -> Checkpoint:
    of: dict[str, list[str]] = {}
    for name, part in parts.items():
        of.setdefault(part.tensor.name, []).append(name)
    found: dict[str, Tensor] = {}
    far: dict[int, Part] = {}
    for name, tensor in checkpoint.tensors.items():
        for each in of.get(name, ()):
            found[each] = _tensor(each, parts[each], len(far))
            if found[each].offset >= _FAR:
                far[len(far)] = parts[each]
        if name not in of:
            found[name] = tensor
    own: dict[str, Any] = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    stacked = {n: p.tensor.name for n, p in parts.items()}
    source = PartSource(checkpoint.source, far)
    return Unstacked(
        **own | {"source": source}, raw=checkpoint, found=found, stacked=stacked, modules=modules
    )


def _tensor(name: str, part: Part, number: int) -> Tensor:
    t = part.tensor
    if part.expert is None:
        return t._replace(name=name)
    slab, shape = t.nbytes // max(1, t.shape[0]), list(t.shape[1:])
    offset = t.offset + part.expert * slab
    if part.axis is not None:
        shape[part.axis] = part.size
    nbytes = slab // (t.shape[1 + part.axis] or 1) * part.size if part.axis is not None else slab
    plain = part.axis is None or (part.axis == 0 and part.step == 1)
    if part.turned:
        shape.reverse()
        plain = plain and min(shape) == 1
    if plain and part.axis is not None:
        offset += part.first * (slab // (t.shape[1] or 1))
    return Tensor(
        name, t.dtype, tuple(shape), t.file, offset if plain else _FAR + (number << 40), nbytes
    )


def restacked(
    names: Iterable[str], config: Mapping[str, Any] | None
) -> dict[str, tuple[str, list[str]]]:
    """Return by name on the hub what the unstacked weights and biases of experts make there.

    Args:
        names: of weights and biases, experts one by one.
        config: of the checkpoint.

    Returns:
        ``weight`` or ``bias`` and the parts, expert by expert and in each the projections in order;
        only what is complete.
    """
    stacking = stacking_of(config)
    if stacking is None:
        return {}
    head = stacking.linear.partition("{}")[0]
    found: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        above, _, projection = module.rpartition(".")
        before, _, number = above.rpartition(".")
        if (
            leaf in ("weight", "bias")
            and number.isdecimal()
            and len(number) < 8
            and f"{before}.".endswith(f".{head}")
        ):
            prefix = f"{before}.".removesuffix(head)
            found.setdefault((prefix, leaf), {})[int(number), projection] = name
    result: dict[str, tuple[str, list[str]]] = {}
    for (prefix, leaf), parts in found.items():
        experts = 1 + max(e for e, _ in parts)
        for suffix, leaves in stacking.stacks.items():
            own = [
                parts.get((e, projection))
                for e in range(min(experts, len(parts)))
                for projection in leaves
            ]
            kept = [n for n in own if n is not None]
            if kept and len(kept) == experts * len(leaves):
                key = f"{prefix}{suffix}"
                result[key if leaf == "weight" else f"{key}_bias"] = (leaf, kept)
    return result


def place_in_file(offset: int) -> int | None:
    """Return an offset in a file, or None for that of a part which is no single stretch of it."""
    return offset if offset < _FAR else None


def expanded(declaration: Declaration | None, checkpoint: Checkpoint) -> Declaration | None:
    """Return a declaration with what it says of a stack said of each linear in it."""
    if declaration is None or not isinstance(checkpoint, Unstacked):
        return declaration
    modules = checkpoint.modules

    def each(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            yield from modules.get(name, (name,))

    layers = {
        m: entry for name, entry in declaration.layers.items() for m in modules.get(name, (name,))
    }
    if layers == declaration.layers and not any(n in modules for n in declaration.exclude):
        return declaration
    return replace(
        declaration, layers=layers, exclude=tuple(dict.fromkeys(each(declaration.exclude)))
    )
