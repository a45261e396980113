# SPDX-License-Identifier: Apache-2.0
"""Tensors gathered into modules: a weight with its siblings, and the format they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

from verifier.checkpoint import Tensor
from verifier.schemes.formats import FORMATS, Format
from verifier.schemes.recognition import (
    CODE_DTYPES,
    WEIGHT_LEAVES,
    recognize,
    scale_leaf,
    weight_leaf,
)
from verifier.schemes.roles import stem
from verifier.schemes.shapes import Shape

SCALE_LEAVES = frozenset(
    {
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "input_scale",
        "pre_quant_scale",
        "weight_global_scale",
        "input_global_scale",
        "scales",
    }
)
"""The leaves of the scales that this project's exporter writes or keeps."""
SIBLING_LEAVES = SCALE_LEAVES | {
    leaf for f in FORMATS.values() for s in f.siblings for leaf in s.leaves
}
"""Every leaf that some format puts next to a weight."""
KV_LEAVES = frozenset({"k_scale", "v_scale"})
CACHE_LEAVES = KV_LEAVES | {"q_scale", "prob_scale", "k_bias", "v_bias", "output_scale"}
"""Every leaf of a quantized KV cache or attention: ``k_scale`` and ``q_scale`` (ModelOpt,
compressed-tensors), ``k_bias`` (ModelOpt's NVFP4_AFFINE), ``output_scale`` of a projection
(compressed-tensors before 0.6, Quark)."""
_AMBIGUOUS = frozenset({"scale", "scales", "biases", "g_idx", "k_bias", "v_bias"})
"""Leaves that are also names of unquantized parameters, where no weight stands next to them."""
LEAVES = (
    (
        SIBLING_LEAVES
        | CACHE_LEAVES
        | {"weight", "bias", "weight_packed", "qweight", "_weight_qdata"}
    )
    - {"scale"}
) - {leaf for leaf in SIBLING_LEAVES if "." in leaf}
_MLX_STACK = ".switch_mlp."
"""What mlx-lm names the experts that it stacks."""
MAX_EXPERTS = 10_000
_JOINED = ("_scale", "_scale_2", "_scale_inv")
_SIBLING = re.compile(r"(\w+_proj)_(weight_scale|weight_scale_2|weight_scale_inv|input_scale)$")
_STATE = re.compile(
    r"\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state))(?:\.[^.]+)?$"
)


def split(name: str) -> tuple[str, str]:
    """Return module and leaf of a tensor name; a bare parameter is its own module with the leaf ''.

    MXFP4's ``<parameter>_blocks`` and ``<parameter>_scales`` are the leaves ``blocks`` and
    ``scales``; ``_weight_scale`` and its like behind a projection of stacked experts are that leaf
    of it; bitsandbytes' ``weight.absmax`` and its like are leaves of two parts. DeepSeek's
    ``scale`` is a leaf only next to a weight of codes: `gather` decides.
    """
    head, _, leaf = name.rpartition(".")
    if leaf.endswith(_JOINED) and head.endswith(".experts") and (found := _SIBLING.match(leaf)):
        return f"{head}.{found[1]}", found[2]
    parameter, _, kind = leaf.rpartition("_")
    if kind in ("blocks", "scales") and parameter and head:
        return (head if parameter == "weight" else f"{head}.{parameter}"), kind
    if leaf in LEAVES and head:
        return head, leaf
    state = _STATE.search(name)
    return (name[: state.start()], state[1]) if state else (name, "")


def canonical(name: str) -> str | None:
    """Return the unquantized name that a tensor stands for, or None for a scale of one."""
    module, leaf = split(name)
    if leaf in SIBLING_LEAVES or leaf in CACHE_LEAVES:
        return None
    if leaf == "blocks":
        return name.removesuffix("_blocks")
    return f"{module}.weight" if leaf in ("weight_packed", "qweight", "_weight_qdata") else name


@dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """What leaves, dtypes and shapes of a module's tensors show; one object for all modules that
    look alike.

    ``weight`` and ``scale`` are leaves; the other attributes are those of `Module`.
    """

    weight: str | None
    scale: str | None
    scales: tuple[str, ...]
    quantized: bool
    dims: tuple[int, int] | None
    inferred_format: Format | None


class Module:
    """A module of a checkpoint: its tensors by leaf (``weight``, ``weight_scale`` …), and what they
    show.

    Attributes:
        name: the module's name on disk.
        stem: the name with the number of a routed expert as 0 (`verifier.schemes.roles.stem`).
        parts: its tensors by leaf.
        weight: the weight, packed or not; a bare parameter is its own weight.
        scale: the block, row or tensor scale, whichever its name.
        scales: the leaves of its siblings: scales, zero points and what else a format has.
        quantized: whether the weight is stored as codes, or has a sibling.
        dims: the logical (out, in) of a two-dimensional weight, in elements.
        inferred_format: the format that dtypes and shapes show, or None where they show none or
            contradict one another.
        signature: the object that modules with equal leaves, dtypes and shapes share where one call
            gathered them.
    """

    __slots__ = (
        "dims",
        "inferred_format",
        "name",
        "parts",
        "quantized",
        "scale",
        "scales",
        "signature",
        "stem",
        "weight",
    )

    def __init__(
        self, name: str, parts: Mapping[str, Tensor], look: Signature | None = None
    ) -> None:
        look = look or look_at(parts)
        self.name, self.stem, self.parts, self.signature = name, stem(name), parts, look
        self.weight = parts[look.weight] if look.weight is not None else None
        self.scale = parts[look.scale] if look.scale is not None else None
        self.scales, self.quantized, self.dims, self.inferred_format = (
            look.scales,
            look.quantized,
            look.dims,
            look.inferred_format,
        )

    def __repr__(self) -> str:
        return f"Module({self.name!r}, {dict(self.parts)!r})"

    def unquantized(self) -> Iterator[tuple[str, Shape | None]]:
        """Yield the unquantized names that its tensors stand for, each with its unquantized shape.

        None is the shape of a weight of codes that has other than two dimensions, or whose width is
        not known.
        """
        for leaf, tensor in self.parts.items():
            if leaf in SIBLING_LEAVES or leaf in CACHE_LEAVES:
                continue
            if leaf == "blocks":
                name = tensor.name.removesuffix("_blocks")
                yield name, self.dims if name.endswith(".weight") else None
            elif leaf == "" or leaf not in WEIGHT_LEAVES:
                yield tensor.name, tensor.shape
            elif leaf == "weight" and _MLX_STACK in self.name and len(tensor.shape) == 3:
                head, _, projection = self.name.partition(_MLX_STACK)
                for expert in range(min(tensor.shape[0], MAX_EXPERTS)):
                    yield f"{head}.experts.{expert}.{projection}.weight", None
            elif leaf == self.signature.weight:
                name = tensor.name if leaf == "weight" else f"{self.name}.weight"
                yield name, self.dims or (tensor.shape if self._plain else None)

    @property
    def _plain(self) -> bool:
        """Whether the stored shape of the weight is its logical one."""
        if self.signature.weight != "weight":
            return False
        shown = self.inferred_format
        return shown is None or shown.weight.formula == "out, in"


def look_at(parts: Mapping[str, Tensor], declared: Format | None = None) -> Signature:
    """Return what the tensors of one module show; ``declared`` as for `recognize`."""
    leaf, scale = weight_leaf(parts), scale_leaf(parts)
    scales = tuple(n for n in parts if n in SIBLING_LEAVES)
    weight = parts[leaf] if leaf is not None else None
    quantized = bool(scales) or (weight is not None and _holds_codes(leaf, weight, declared))
    shown, dims = None, None
    if weight is not None and quantized:
        shown, dims = recognize(parts, declared)
    elif weight is not None and len(weight.shape) == 2:
        dims = weight.shape[0], weight.shape[1]
    return Signature(leaf, scale, scales, quantized, dims, shown)


def _holds_codes(leaf: str | None, weight: Tensor, declared: Format | None = None) -> bool:
    """Whether a weight without siblings holds codes: other whole numbers are a buffer where no
    declaration says that they are codes.
    """
    if weight.dtype in ("F8_E4M3", "U8"):
        return True
    if leaf == "" or weight.dtype not in CODE_DTYPES:
        return False
    return leaf != "weight" or (declared is not None and weight.dtype in declared.weight.dtypes)


DeclaredFor = Callable[[str], Format | None]


_DTYPE_AND_SHAPE = itemgetter(Tensor._fields.index("dtype"), Tensor._fields.index("shape"))


def gather(tensors: Iterable[Tensor], declared_for: DeclaredFor | None = None) -> dict[str, Module]:
    """Return the modules of some tensors by name, in their order.

    Args:
        tensors: what to gather.
        declared_for: gives the format that a config declares for a module, where tensors do not
            determine it.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    unsure: list[str] = []
    for tensor in tensors:
        name = tensor[0]
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES or not module:
            if leaf == "scale" and module:
                unsure.append(module)
            else:
                module, leaf = split(name)
        elif leaf in _AMBIGUOUS:
            unsure.append(module)
        found = parts.get(module)
        if found is None:
            parts[module] = {leaf: tensor}
        else:
            found[leaf] = tensor
    for module in unsure:
        _separate(module, parts)
    looks: dict[tuple[object, ...], Signature] = {}
    modules = {}
    for name, p in parts.items():
        declared = declared_for(name) if declared_for is not None else None
        key = (declared, *p, *map(_DTYPE_AND_SHAPE, p.values()))
        look = looks.get(key)
        if look is None:
            look = looks[key] = look_at(p, declared)
        modules[name] = Module(name, p, look)
    return modules


def _separate(module: str, parts: dict[str, dict[str, Tensor]]) -> None:
    """Make parameters of their own of leaves that are siblings only next to a weight of codes."""
    own = parts.get(module, {})
    leaf = weight_leaf(own)
    weight = own[leaf] if leaf is not None else None
    for name in [n for n in own if n in _AMBIGUOUS]:
        if name in ("k_bias", "v_bias"):
            known = "k_scale" in own or "v_scale" in own
        elif weight is None:
            known = "qzeros" in own
        else:
            known = leaf != "" and weight.dtype in CODE_DTYPES
        if not known:
            tensor = own.pop(name)
            parts[tensor.name] = {"": tensor}
    if not own:
        parts.pop(module, None)
