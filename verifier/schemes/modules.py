# SPDX-License-Identifier: Apache-2.0
"""Tensors gathered into modules: a weight with its scale siblings, and the format they show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from verifier.checkpoint import Tensor
from verifier.schemes.formats import FORMATS, Format

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
KV_LEAVES = frozenset({"k_scale", "v_scale"})
LEAVES = (SCALE_LEAVES - {"scales"}) | KV_LEAVES | {"weight", "bias", "weight_packed"}
FLOATS = frozenset({"BF16", "F16", "F32"})
_JOINED = ("_scale", "_scale_2", "_scale_inv")
_SIBLING = re.compile(r"(\w+_proj)_(weight_scale|weight_scale_2|weight_scale_inv|input_scale)$")


def split(name: str) -> tuple[str, str]:
    """Return module and leaf of a tensor name; a bare parameter is its own module with the leaf ''.

    MXFP4's ``<parameter>_blocks`` and ``<parameter>_scales`` are the leaves ``blocks`` and
    ``scales``; ``_weight_scale`` and its like behind a projection of stacked experts are that leaf
    of it.
    """
    head, _, leaf = name.rpartition(".")
    if leaf.endswith(_JOINED) and head.endswith(".experts") and (found := _SIBLING.match(leaf)):
        return f"{head}.{found[1]}", found[2]
    parameter, _, kind = leaf.rpartition("_")
    if kind in ("blocks", "scales") and parameter and head:
        return (head if parameter == "weight" else f"{head}.{parameter}"), kind
    return (head, leaf) if leaf in LEAVES and head else (name, "")


def canonical(name: str) -> str | None:
    """Return the unquantized name that a tensor stands for, or None for a scale of one."""
    module, leaf = split(name)
    if leaf in SCALE_LEAVES or leaf in KV_LEAVES:
        return None
    if leaf == "blocks":
        return name.removesuffix("_blocks")
    return f"{module}.weight" if leaf == "weight_packed" else name


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
        parts: its tensors by leaf.
        weight: the weight, packed or not; a bare parameter is its own weight.
        scale: the block, row or tensor scale, whichever its name.
        scales: the leaves of its weight and activation scales.
        quantized: whether the weight is stored as codes, or has a scale.
        dims: the logical (out, in) of a two-dimensional weight, in elements.
        inferred_format: the format that dtypes and shapes show, or None where they show none or contradict
            one another.
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
        "weight",
    )

    def __init__(
        self, name: str, parts: Mapping[str, Tensor], look: Signature | None = None
    ) -> None:
        look = look or look_at(parts)
        self.name, self.parts, self.signature = name, parts, look
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


def look_at(parts: Mapping[str, Tensor]) -> Signature:
    """Return what the tensors of one module show."""
    leaf = next((n for n in ("weight", "weight_packed", "", "blocks") if n in parts), None)
    scale = next((n for n in ("weight_scale", "weight_scale_inv", "scales") if n in parts), None)
    scales = tuple(n for n in parts if n in SCALE_LEAVES)
    weight = parts[leaf] if leaf is not None else None
    quantized = bool(scales) or (weight is not None and weight.dtype in ("F8_E4M3", "U8"))
    dims = None
    if weight is not None and "blocks" in parts and len(weight.shape) == 3:
        dims = weight.shape[0], weight.shape[1] * 32
    elif weight is not None and len(weight.shape) == 2:
        dims = weight.shape[0], weight.shape[1] * (2 if weight.dtype == "U8" else 1)
    shown = None
    if weight is not None and quantized and dims is not None:
        shown = _shown(parts, weight, parts[scale] if scale is not None else None, dims)
    return Signature(leaf, scale, scales, quantized, dims, shown)


def _shown(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, dims: tuple[int, int]
) -> Format | None:
    mxfp4 = FORMATS["mxfp4"]
    if weight.dtype == "U8" and scale is not None and scale.dtype in mxfp4.siblings[0].dtypes:
        if scale.shape in mxfp4.siblings[0].shapes(*dims):
            return mxfp4
    if "weight_packed" in parts:
        return FORMATS["nvfp4_ct"] if weight.dtype == "U8" else None
    if weight.dtype == "U8":
        return FORMATS["nvfp4" if "input_scale" in parts else "w4a16_nvfp4"]
    if weight.dtype != "F8_E4M3" or scale is None:
        return None
    if scale.dtype in ("U8", "F8_E8M0"):
        return (
            FORMATS["mxfp8"] if scale.shape in FORMATS["mxfp8"].siblings[0].shapes(*dims) else None
        )
    for name in ("fp8", "fp8_per_channel", "fp8_block"):
        if scale.shape in FORMATS[name].siblings[0].shapes(*dims):
            return FORMATS[name]
    return None


def gather(tensors: Iterable[Tensor]) -> dict[str, Module]:
    """Return the modules of some tensors by name, in their order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        name = tensor[0]
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES or not module:
            module, leaf = split(name)
        found = parts.get(module)
        if found is None:
            parts[module] = {leaf: tensor}
        else:
            found[leaf] = tensor
    looks: dict[tuple[object, ...], Signature] = {}
    modules = {}
    for name, p in parts.items():
        key = tuple([(leaf, t[1], t[2]) for leaf, t in p.items()])
        look = looks.get(key)
        if look is None:
            look = looks[key] = look_at(p)
        modules[name] = Module(name, p, look)
    return modules
