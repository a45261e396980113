# SPDX-License-Identifier: Apache-2.0
"""Picks the tensors and modules of a clean checkpoint in which defects are made."""

from __future__ import annotations

import re
from collections.abc import Callable

from verifier.selftest.editor import CheckpointEditor, StoredTensor

GATES, UPS, DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
Pick = Callable[[CheckpointEditor], str]
"""Returns the name of one tensor."""
_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.([^.]+)$")
_FLOATS = ("BF16", "F16", "F32")


def is_expert(module: str) -> bool:
    """Whether a module is a projection of one routed expert."""
    return _EXPERT.match(module) is not None


def expert_of(module: str) -> tuple[str, int, str]:
    """Return container (``….experts``), number and leaf of an expert's projection."""
    match = _EXPERT.match(module)
    if match is None:
        raise ValueError(f"{module}: not an expert")
    return match[1], int(match[2]), match[3]


def quantized(ckpt: CheckpointEditor) -> list[str]:
    """Return the modules with a weight scale, in file order."""
    return [m for m, parts in ckpt.modules().items() if "weight" in parts and scale_leaf(parts)]


def scale_leaf(parts: dict[str, StoredTensor]) -> str | None:
    """Return the leaf of a module's block scale, or None."""
    return next((leaf for leaf in ("weight_scale", "weight_scale_inv") if leaf in parts), None)


def e8m0_leaf(ckpt: CheckpointEditor) -> str:
    """Return the leaf of the MXFP8 scales."""
    for parts in ckpt.modules().values():
        leaf = scale_leaf(parts)
        if leaf and parts[leaf].dtype == "U8":
            return leaf
    raise LookupError("no MXFP8 scale")


def target(ckpt: CheckpointEditor, leaves: tuple[str, ...] = GATES) -> str:
    """Return a quantized projection: an expert's from the middle, or one of a dense layer."""
    modules = [m for m in quantized(ckpt) if m.rpartition(".")[2] in leaves]
    candidates = [m for m in modules if is_expert(m)] or modules
    return candidates[len(candidates) // 2]


def block_scale(ckpt: CheckpointEditor, module: str) -> str:
    """Return the name of a module's block scale."""
    return f"{module}.{scale_leaf(ckpt.modules()[module])}"


def sibling_of(module: str, leaves: tuple[str, ...]) -> str:
    """Return the projection next to another, as its family spells it: ``w1`` and `UPS` give
    ``w3``.
    """
    head, _, leaf = module.rpartition(".")
    spelling = 1 if leaf in (GATES[1], UPS[1], DOWNS[1]) else 0
    return f"{head}.{leaves[spelling]}"


def attention_head(ckpt: CheckpointEditor) -> str:
    """Return the first attention module."""
    return next(m for m in ckpt.modules() if m.endswith(".q_proj")).removesuffix(".q_proj")


def projection_of(ckpt: CheckpointEditor, leaf: str) -> str:
    """Return the first module whose name ends with a leaf."""
    return next(m for m in ckpt.modules() if m.endswith(leaf))


def plain_linear(ckpt: CheckpointEditor) -> str:
    """Return an unquantized linear layer: a router if there is one, else the head."""
    linears = []
    for module, parts in ckpt.modules().items():
        weight = parts.get("weight")
        if weight and weight.dtype in _FLOATS and len(weight.shape) == 2 and "embed" not in module:
            linears.append(module)
    return next((m for m in linears if m.endswith(".gate")), linears[0])


def norm(ckpt: CheckpointEditor) -> str:
    """Return the weight of the first layer norm."""
    for module, parts in ckpt.modules().items():
        if module.endswith("layernorm") and "weight" in parts:
            if parts["weight"].dtype in _FLOATS:
                return f"{module}.weight"
    raise LookupError("no layer norm")


def embedding(ckpt: CheckpointEditor) -> str:
    """Return the weight of the token embedding."""
    return next(n for n in ckpt.tensors() if n.endswith("embed_tokens.weight"))


def router(ckpt: CheckpointEditor) -> str:
    """Return the weight of an unquantized linear layer, see `plain_linear`."""
    return f"{plain_linear(ckpt)}.weight"


def weight(leaves: tuple[str, ...] = GATES) -> Pick:
    """Pick the weight of a quantized projection."""
    return part("weight", leaves)


def part(leaf: str, leaves: tuple[str, ...] = GATES) -> Pick:
    """Pick one tensor of a quantized projection."""
    return lambda ckpt: f"{target(ckpt, leaves)}.{leaf}"


def scale(leaves: tuple[str, ...] = GATES) -> Pick:
    """Pick the block scale of a quantized projection."""
    return lambda ckpt: block_scale(ckpt, target(ckpt, leaves))


def up_part(leaf: str) -> Pick:
    """Pick one tensor of the up projection next to the picked gate."""
    return lambda ckpt: f"{sibling_of(target(ckpt), UPS)}.{leaf}"
