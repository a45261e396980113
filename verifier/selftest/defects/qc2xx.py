# SPDX-License-Identifier: Apache-2.0
"""Defects of names and layout: QC201 to QC209."""

from __future__ import annotations

from typing import Any

import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import (
    Array,
    drop,
    drop_module,
    edit_exclusions,
    exclude,
    rename,
    rename_all,
    transform,
)
from verifier.selftest.corruptor import NVFP4, UNIFORM, Change, add, defect, on
from verifier.selftest.editor import CONFIG, CheckpointEditor
from verifier.selftest.encode import mxfp8
from verifier.selftest.pick import (
    DOWNS,
    GATES,
    UPS,
    attention_head,
    block_scale,
    expert_of,
    norm,
    plain_linear,
    projection_of,
    quantized,
    router,
    sibling_of,
    target,
    weight,
)

_OTHER_LEAVES = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_HUB_PREFIXES = ("language_model.model.", "model.")


def _in_memory(name: str) -> str:
    """Return the name that transformers uses in memory."""
    for prefix in _HUB_PREFIXES:
        if name.startswith(prefix):
            return f"model.language_model.{name.removeprefix(prefix)}"
    return name


def _layer_experts(ckpt: CheckpointEditor) -> tuple[str, list[str]]:
    """Return the container of the picked expert, and the projections in it."""
    container = expert_of(target(ckpt))[0]
    return container, [m for m in quantized(ckpt) if m.startswith(f"{container}.")]


# QC201


@defect("QC201", also="410")
def in_memory_names(ckpt: CheckpointEditor) -> Where:
    """Give every tensor its name in transformers' memory (nvidia/MiniMax-M3-NVFP4 v1)."""
    return rename_all(ckpt, {n: _in_memory(n) for n in ckpt.tensors() if _in_memory(n) != n})


add("QC201", "one-in-memory-name", rename(norm, _in_memory))


@defect("QC201", also="410")
def quantized_module_with_wrong_prefix(ckpt: CheckpointEditor) -> Where:
    """Give one quantized module, scales included, the prefix of a different model."""
    module = target(ckpt)
    new = f"model.decoder.{module[module.index('layers.') :]}"
    ckpt.rename_module(module, new)
    return ckpt.where(f"{new}.weight")


# QC202


@defect("QC202", also="402 404 410")
def vision_rule_on_all(ckpt: CheckpointEditor) -> Where:
    """Apply a renaming that is meant for the vision tower to every key."""
    names = {n: f"model.visual.{n.removeprefix('model.')}" for n in ckpt.tensors()}
    ckpt.rename(names)
    return ckpt.where(min(new for old, new in names.items() if ".layers." in old))


@defect("QC202", on(traits="vision"), also="402 404")
def text_rule_on_the_tower(ckpt: CheckpointEditor) -> Where:
    """Put the vision tower under the prefix of the language model."""
    tower = [n for n in ckpt.tensors() if n.startswith("vision_tower.")]
    return rename_all(ckpt, {n: f"language_model.model.{n}" for n in tower})


# QC203


def _replace_by_fused(ckpt: CheckpointEditor, parts: list[str], fused: dict[str, Array]) -> Where:
    """Drop modules and add fused tensors to the shard of the first."""
    file = ckpt.tensors()[f"{parts[0]}.weight"].file
    for module in parts:
        ckpt.drop(ckpt.siblings(module))
    for name, values in fused.items():
        ckpt.add(name, values, file=file)
    return ckpt.where(next(name for name in fused if name.endswith(".weight")))


@defect("QC203", on(traits="experts"), also="410")
def experts_stacked(ckpt: CheckpointEditor) -> Where:
    """Save a layer's experts as transformers' 3-D stacks: gate_up_proj and down_proj."""
    container, projections = _layer_experts(ckpt)
    gates = [m for m in projections if m.endswith(GATES)]

    def stack(leaves: tuple[str, ...], leaf: str) -> Array:
        return np.stack([ckpt.array(f"{sibling_of(m, leaves)}.{leaf}") for m in gates])

    fused = {}
    for leaf, tensor in ckpt.modules()[gates[0]].items():
        gate = stack(GATES, leaf)
        gate_up = np.concatenate([gate, stack(UPS, leaf)], axis=1) if tensor.shape else gate
        fused[f"{container}.gate_up_proj.{leaf}"] = gate_up
        fused[f"{container}.down_proj.{leaf}"] = stack(DOWNS, leaf)
    modules = [sibling_of(m, leaves) for m in gates for leaves in (GATES, UPS, DOWNS)]
    return _replace_by_fused(ckpt, modules, fused)


@defect("QC203", also="402 404 410")
def qkv_fused(ckpt: CheckpointEditor) -> Where:
    """Save q, k and v of one layer as a single fused projection, scales included."""
    head = attention_head(ckpt)
    members = [f"{head}.{leaf}_proj" for leaf in "qkv"]
    fused = {}
    for leaf, tensor in ckpt.modules()[members[0]].items():
        if tensor.shape:
            values = np.concatenate([ckpt.array(f"{m}.{leaf}") for m in members])
            fused[f"{head}.qkv_proj.{leaf}"] = values
    return _replace_by_fused(ckpt, members, fused)


# QC204


@defect("QC204", on(traits="experts"), also="410")
def expert_leaves(ckpt: CheckpointEditor) -> Where:
    """Rename the expert projections of a layer from gate, up, down to w1, w3, w2, or back."""
    names: dict[str, str] = {}
    for module in _layer_experts(ckpt)[1]:
        head, _, leaf = module.rpartition(".")
        new = f"{head}.{_OTHER_LEAVES[leaf]}"
        names |= {n: f"{new}{n[len(module) :]}" for n in ckpt.siblings(module)}
    return rename_all(ckpt, names, ".weight")


@defect("QC204", also="402 404 410")
def container(ckpt: CheckpointEditor) -> Where:
    """Rename ``mlp`` of one layer to ``block_sparse_moe``, or back."""
    module = target(ckpt)
    old, new = ".mlp.", ".block_sparse_moe."
    if old not in module:
        old, new = new, old
    layer = module[: module.index(old) + len(old)]
    names = {n: n.replace(old, new) for n in ckpt.tensors() if n.startswith(layer)}
    return rename_all(ckpt, names, ".weight")


# QC205 to QC207

add("QC205", "norm-lost", drop(norm))
add("QC205", "linear-lost", drop_module(lambda ckpt: projection_of(ckpt, ".o_proj")), also="404")
add(
    "QC207",
    "expert-projection-lost",
    drop_module(lambda ckpt: target(ckpt, DOWNS)),
    on(traits="experts"),
)


def _drop_mtp(count: int | None) -> Change:
    """Drop the first MTP tensors, or all: transformers does so when it loads a model."""

    def change(ckpt: CheckpointEditor) -> Where:
        names = [n for n in ckpt.tensors() if n.startswith("mtp.")][:count]
        ckpt.drop(names)
        return Where(min(names))

    return change


add("QC206", "mtp-lost", _drop_mtp(None), on(traits="mtp", needs="base"))
add("QC206", "mtp-tensor-lost", _drop_mtp(1), on(traits="mtp", needs="base"))


@defect("QC207", on(traits="experts"))
def expert_lost(ckpt: CheckpointEditor) -> Where:
    """Drop one routed expert."""
    container, number, _ = expert_of(target(ckpt))
    prefix = f"{container}.{number}."
    names = [n for n in ckpt.tensors() if n.startswith(prefix)]
    ckpt.drop(names)
    return Where(min(n for n in names if n.endswith(".weight")))


@defect("QC207", on(traits="experts"))
def layer_without_experts(ckpt: CheckpointEditor) -> Where:
    """Drop all experts of one layer: a layer filter matched nothing."""
    container = expert_of(target(ckpt))[0]
    names = [n for n in ckpt.tensors() if n.startswith(f"{container}.")]
    ckpt.drop(names)
    return Where(min(n for n in names if n.endswith(".weight")))


# QC208


@defect("QC208", also="306")
def quantized_transposed(ckpt: CheckpointEditor) -> Where:
    """Write a quantized projection and its block scale transposed."""
    module = target(ckpt, DOWNS)
    for name in (f"{module}.weight", block_scale(ckpt, module)):
        ckpt.store(name, np.ascontiguousarray(ckpt.array(name).T))
    return ckpt.where(f"{module}.weight")


add("QC208", "linear-transposed", transform(router, np.transpose))
add("QC208", "halved-twice", transform(weight(), lambda v: v[:, ::2]), on(NVFP4), also="306")


@defect("QC208")
def config_of_other_size(ckpt: CheckpointEditor) -> Where:
    """Take config.json from a model with narrower projections."""

    def narrow(config: dict[str, Any]) -> None:
        text = config.get("text_config", config)
        key = "moe_intermediate_size" if "moe_intermediate_size" in text else "intermediate_size"
        text[key] //= 2

    ckpt.edit_json(CONFIG, narrow)
    return Where()


# QC209


def _tower_modules(ckpt: CheckpointEditor) -> list[str]:
    """Return the modules of the vision tower with a weight of two or more dimensions."""
    modules = ckpt.modules()
    tower = [m for m in modules if "vision_tower." in m and "weight" in modules[m]]
    return [m for m in tower if len(modules[m]["weight"].shape) > 1]


def _tower_linear(ckpt: CheckpointEditor) -> str:
    modules = ckpt.modules()
    return next(m for m in _tower_modules(ckpt) if len(modules[m]["weight"].shape) == 2)


@defect("QC209", on(traits="vision"))
def tower_excluded_by_wrapper(ckpt: CheckpointEditor) -> Where:
    """Exclude a linear layer of the tower under the name of its calibration wrapper."""
    exclude(ckpt, f"{_tower_linear(ckpt)}.linear")
    return Where(None, CONFIG)


@defect("QC209", on(UNIFORM), also="402")
def router_excluded_by_wrapper(ckpt: CheckpointEditor) -> Where:
    """Exclude the router only under the name of a wrapper."""
    module = plain_linear(ckpt)
    edit_exclusions(ckpt, lambda listed: [f"{p}.linear" if p == module else p for p in listed])
    return Where(None, CONFIG)


def _checkpoint_wrapped(name: str) -> str:
    """Return the name that activation checkpointing gives a weight."""
    return name.replace(".weight", "._checkpoint_wrapped_module.weight")


add("QC209", "wrapped-norm", rename(norm, _checkpoint_wrapped))


@defect("QC209", on(traits="vision"))
def wrapped_tower(ckpt: CheckpointEditor) -> Where:
    """Save the tower's linear layers under the names of their calibration wrappers."""
    modules = ckpt.modules()
    names: dict[str, str] = {}
    for module, parts in modules.items():
        if "vision_tower." in module and "_proj" in module and "weight" in parts:
            names |= {n: f"{module}.linear{n[len(module) :]}" for n in ckpt.siblings(module)}
    return rename_all(ckpt, names, "weight")


@defect("QC209", on(traits="vision"), severity="warning")
def tower_quantized(ckpt: CheckpointEditor) -> Where:
    """Quantize one linear layer of the tower to MXFP8, and remove it from the exclusions."""
    module = _tower_linear(ckpt)
    name = f"{module}.weight"
    parts = mxfp8(ckpt.array(name), "weight_scale_inv")
    ckpt.store(name, parts["weight"])
    file = ckpt.tensors()[name].file
    ckpt.add(f"{module}.weight_scale_inv", parts["weight_scale_inv"], file=file)
    others = [m for m in _tower_modules(ckpt) if m != module]

    def edit(listed: list[str]) -> list[str]:
        return [*(p for p in listed if p not in ("vision_tower", module)), *others]

    edit_exclusions(ckpt, edit)
    return ckpt.where(name)
