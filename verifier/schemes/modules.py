# SPDX-License-Identifier: Apache-2.0
"""Tensors gathered into modules: a weight with its scale siblings, and the format they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from verifier.checkpoint import Tensor
from verifier.schemes.formats import FORMATS, Format

SCALE_LEAVES = frozenset(
    {"weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "pre_quant_scale", "weight_global_scale",
     "input_global_scale", "scales"}
)  # fmt: skip
KV_LEAVES = frozenset({"k_scale", "v_scale"})
LEAVES = (SCALE_LEAVES - {"scales"}) | KV_LEAVES | {"weight", "bias", "weight_packed"}
FLOATS = frozenset({"BF16", "F16", "F32"})


def split(name: str) -> tuple[str, str]:
    """Return module and leaf of a tensor name; a bare parameter is its own module with the leaf ''.

    MXFP4's ``<parameter>_blocks`` and ``<parameter>_scales`` are the leaves ``blocks`` and ``scales``.
    """
    head, _, leaf = name.rpartition(".")
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


@dataclass(frozen=True)
class Module:
    """A module of a checkpoint: its tensors by leaf (``weight``, ``weight_scale`` …)."""

    name: str
    parts: Mapping[str, Tensor]

    @cached_property
    def weight(self) -> Tensor | None:
        """The weight, packed or not; a bare parameter is its own weight."""
        return next((self.parts[leaf] for leaf in ("weight", "weight_packed", "", "blocks") if leaf in self.parts), None)

    @cached_property
    def scales(self) -> tuple[str, ...]:
        """The leaves of its weight and activation scales."""
        return tuple(leaf for leaf in self.parts if leaf in SCALE_LEAVES)

    @property
    def scale(self) -> Tensor | None:
        """The block, row or tensor scale, whichever its name."""
        return next((self.parts[n] for n in ("weight_scale", "weight_scale_inv", "scales") if n in self.parts), None)

    @cached_property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes, or has a scale."""
        weight = self.weight
        return bool(self.scales) or (weight is not None and weight.dtype in ("F8_E4M3", "U8"))

    @cached_property
    def dims(self) -> tuple[int, int] | None:
        """The logical (out, in) of a two-dimensional weight, in elements."""
        weight = self.weight
        if weight is not None and "blocks" in self.parts and len(weight.shape) == 3:
            return weight.shape[0], weight.shape[1] * 32
        if weight is None or len(weight.shape) != 2:
            return None
        return weight.shape[0], weight.shape[1] * (2 if weight.dtype == "U8" else 1)

    @cached_property
    def shown(self) -> Format | None:
        """The format that dtypes and shapes on disk show, or None where they show none or contradict one another."""
        weight, scale = self.weight, self.scale
        if weight is None or not self.quantized or self.dims is None:
            return None
        mxfp4 = FORMATS["mxfp4"]
        if weight.dtype == "U8" and scale is not None and scale.dtype in mxfp4.siblings[0].dtypes:
            if scale.shape in mxfp4.siblings[0].shapes(*self.dims):
                return mxfp4
        if "weight_packed" in self.parts:
            return FORMATS["nvfp4_ct"] if weight.dtype == "U8" else None
        if weight.dtype == "U8":
            return FORMATS["nvfp4" if "input_scale" in self.parts else "w4a16_nvfp4"]
        if weight.dtype != "F8_E4M3" or scale is None:
            return None
        out, in_ = self.dims
        if scale.dtype in ("U8", "F8_E8M0"):
            return FORMATS["mxfp8"] if scale.shape in FORMATS["mxfp8"].siblings[0].shapes(out, in_) else None
        for name in ("fp8", "fp8_per_channel", "fp8_block"):
            sibling = FORMATS[name].siblings[0]
            if scale.shape in sibling.shapes(out, in_):
                return FORMATS[name]
        return None


def gather(tensors: Iterable[Tensor]) -> dict[str, Module]:
    """Return the modules of some tensors by name, in their order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        module, leaf = split(tensor.name)
        parts.setdefault(module, {})[leaf] = tensor
    return {name: Module(name, p) for name, p in parts.items()}
