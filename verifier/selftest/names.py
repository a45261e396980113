# SPDX-License-Identifier: Apache-2.0
"""Defects of names and layout: QC111 and QC201 to QC209."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.selftest.corruptor import (
    DOWNS,
    GATES,
    NVFP4,
    UNIFORM,
    UPS,
    Corruptor,
    block_scale,
    declarations,
    edit,
    exclusions,
    expert_of,
    ids,
    is_expert,
    norm,
    plain_linear,
    quantized,
    sibling_of,
    target,
)
from verifier.selftest.edit import CONFIG, Folder, Place

_EXPERTS = frozenset({"experts"})
_VISION = frozenset({"vision"})
_LEAVES = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_MEMORY = (("language_model.model.", "model.language_model."), ("model.", "model.language_model."))


def _memory_name(name: str) -> str:
    for hub, memory in _MEMORY:
        if name.startswith(hub):
            return memory + name.removeprefix(hub)
    return name


def _place_of_first(folder: Folder, names: Iterable[str]) -> Place:
    return folder.place(min(names))


def all_in_memory(folder: Folder) -> Place:
    """Give every tensor the name that transformers uses in memory (nvidia/MiniMax-M3-NVFP4 v1)."""
    names = {n: m for n in folder.tensors() if (m := _memory_name(n)) != n}
    folder.rename(names)
    return _place_of_first(folder, names.values())


def one_prefix(folder: Folder) -> Place:
    """Give one norm the prefix of transformers' memory."""
    name = norm(folder)
    folder.rename({name: _memory_name(name)})
    return folder.place(_memory_name(name))


def quantized_prefix(folder: Folder) -> Place:
    """Give one quantized module, scales and all, another model's prefix."""
    module = target(folder)
    new = f"model.decoder.{module[module.index('layers.') :]}"
    folder.rename_module(module, new)
    return folder.place(f"{new}.weight")


def _leaked(leaf: str) -> Callable[[Folder], Place]:
    """Return a change that saves a quantizer's buffer with the weights."""
    return lambda folder: folder.add(f"{target(folder)}.{leaf}", np.ones((), np.float32))


def fused_quantizers(folder: Folder) -> Place:
    """Save the quantizers of one layer's fused experts with the weights."""
    container = expert_of(target(folder))[0]
    for number in range(3):
        place = folder.add(
            f"{container}.down_proj_weight_quantizers.{number}._amax", np.ones((), np.float32)
        )
    return Place(f"{container}.down_proj_weight_quantizers.0._amax", place.file)


def vision_rule_on_all(folder: Folder) -> Place:
    """Apply a renaming that is meant for the vision tower to every key."""
    names = {n: f"model.visual.{n.removeprefix('model.')}" for n in folder.tensors()}
    folder.rename(names)
    return folder.place(min(names[n] for n in names if ".layers." in n))


def text_rule_on_the_tower(folder: Folder) -> Place:
    """Put the vision tower under the language model's prefix."""
    names = {
        n: f"language_model.model.{n}" for n in folder.tensors() if n.startswith("vision_tower.")
    }
    folder.rename(names)
    return _place_of_first(folder, names.values())


def _stack(folder: Folder, modules: list[str], leaf: str) -> npt.NDArray[Any]:
    return np.stack([folder.array(f"{m}.{leaf}") for m in modules])


def experts_stacked(folder: Folder) -> Place:
    """Save one layer's experts as the 3-D stacks of transformers' memory: gate_up_proj and
    down_proj.
    """
    container = expert_of(target(folder))[0]
    gates = [
        m
        for m in quantized(folder)
        if is_expert(m) and expert_of(m)[0] == container and m.endswith(GATES)
    ]
    parts = folder.modules()[gates[0]]
    made = {}
    for leaf, tensor in parts.items():
        gate, up, down = (
            _stack(folder, [sibling_of(m, leaves) for m in gates], leaf)
            for leaves in (GATES, UPS, DOWNS)
        )
        made[f"{container}.gate_up_proj.{leaf}"] = (
            np.concatenate([gate, up], axis=1) if tensor.shape else gate
        )
        made[f"{container}.down_proj.{leaf}"] = down
    file = parts["weight"].file
    folder.drop(
        n
        for m in gates
        for leaves in (GATES, UPS, DOWNS)
        for n in folder.siblings(sibling_of(m, leaves))
    )
    for name, values in made.items():
        folder.add(name, values, file=file)
    return folder.place(f"{container}.gate_up_proj.weight")


def qkv_fused(folder: Folder) -> Place:
    """Save one layer's q, k and v as a single fused projection, scales with them."""
    head = next(m for m in folder.modules() if m.endswith(".q_proj")).removesuffix(".q_proj")
    parts = folder.modules()[f"{head}.q_proj"]
    members = [f"{head}.{p}_proj" for p in "qkv"]
    made = {
        f"{head}.qkv_proj.{leaf}": np.concatenate([folder.array(f"{m}.{leaf}") for m in members])
        for leaf, tensor in parts.items()
        if tensor.shape
    }
    file = parts["weight"].file
    folder.drop(n for m in members for n in folder.siblings(m))
    for name, values in made.items():
        folder.add(name, values, file=file)
    return folder.place(f"{head}.qkv_proj.weight")


def leaves_of_another_family(folder: Folder) -> Place:
    """Call one layer's expert projections w1, w3, w2 where the hub has gate, up, down (or the
    reverse).
    """
    container = expert_of(target(folder))[0]
    names: dict[str, str] = {}
    for module in quantized(folder):
        if is_expert(module) and expert_of(module)[0] == container:
            head, _, leaf = module.rpartition(".")
            names |= {
                n: f"{head}.{_LEAVES[leaf]}{n[len(module) :]}" for n in folder.siblings(module)
            }
    folder.rename(names)
    return _place_of_first(folder, (n for n in names.values() if n.endswith(".weight")))


def container_of_another_family(folder: Folder) -> Place:
    """Call one layer's ``mlp`` ``block_sparse_moe`` (or the reverse)."""
    module = target(folder)
    old, new = (
        (".mlp.", ".block_sparse_moe.") if ".mlp." in module else (".block_sparse_moe.", ".mlp.")
    )
    layer = module[: module.index(old) + len(old)]
    names = {n: n.replace(old, new) for n in folder.tensors() if n.startswith(layer)}
    folder.rename(names)
    return _place_of_first(folder, (n for n in names.values() if n.endswith(".weight")))


def norm_lost(folder: Folder) -> Place:
    """Drop a layer norm, as where a training framework fused it into its neighbour."""
    name = norm(folder)
    folder.drop([name])
    return Place(name)


def linear_lost(folder: Folder) -> Place:
    """Drop an attention projection, scales and all."""
    module = next(m for m in folder.modules() if m.endswith(".o_proj"))
    folder.drop(folder.siblings(module))
    return Place(f"{module}.weight")


def expert_lost(folder: Folder) -> Place:
    """Drop one routed expert."""
    container, number, _ = expert_of(target(folder))
    modules = [m for m in quantized(folder) if m.startswith(f"{container}.{number}.")]
    folder.drop(n for m in modules for n in folder.siblings(m))
    return Place(f"{min(modules)}.weight")


def expert_projection_lost(folder: Folder) -> Place:
    """Drop the down projection of one expert."""
    module = target(folder, DOWNS)
    folder.drop(folder.siblings(module))
    return Place(f"{module}.weight")


def layer_of_experts_lost(folder: Folder) -> Place:
    """Drop all experts of one layer: a layer filter matched nothing."""
    container = expert_of(target(folder))[0]
    names = [n for n in folder.tensors() if n.startswith(f"{container}.")]
    folder.drop(names)
    return Place(min(n for n in names if n.endswith(".weight")))


def _mtp_lost(number: int | None) -> Callable[[Folder], Place]:
    """Return the loss of the first ``number`` MTP tensors, or of all: transformers drops them when
    it loads.
    """

    def apply(folder: Folder) -> Place:
        names = [n for n in folder.tensors() if n.startswith("mtp.")][:number]
        folder.drop(names)
        return Place(min(names))

    return apply


def tower_excluded_by_wrapper(folder: Folder) -> Place:
    """Exclude a linear of the tower under the name of the module that wraps it during
    calibration.
    """
    name = f"{_tower_linear(folder)}.linear"
    declarations(folder, exclusions(lambda listed: [*listed, name]))
    return Place(None, CONFIG)


def router_excluded_by_wrapper(folder: Folder) -> Place:
    """Exclude the router under a wrapper's name only."""
    module = plain_linear(folder)
    declarations(
        folder, exclusions(lambda listed: [f"{p}.linear" if p == module else p for p in listed])
    )
    return Place(None, CONFIG)


def wrapped_norm(folder: Folder) -> Place:
    """Save a norm under the name that activation checkpointing gives it."""
    name = norm(folder)
    new = name.replace(".weight", "._checkpoint_wrapped_module.weight")
    folder.rename({name: new})
    return folder.place(new)


def wrapped_tower(folder: Folder) -> Place:
    """Save the tower's linears under the names of the modules that wrap them during calibration."""
    modules = [
        m
        for m, p in folder.modules().items()
        if "vision_tower." in m and "weight" in p and "_proj" in m
    ]
    names = {n: f"{m}.linear{n[len(m) :]}" for m in modules for n in folder.siblings(m)}
    folder.rename(names)
    return _place_of_first(folder, (n for n in names.values() if n.endswith("weight")))


def _tower_linear(folder: Folder) -> str:
    return next(
        m
        for m, p in folder.modules().items()
        if "vision_tower." in m and len(p["weight"].shape) == 2
    )


def tower_quantized(folder: Folder) -> Place:
    """Quantize one linear of the tower to MXFP8, and take it out of the exclusions."""
    module = _tower_linear(folder)
    values = folder.array(f"{module}.weight").astype(np.float32)
    blocks = values.reshape(len(values), -1, 32)
    largest = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), np.float32(2.0**-100))
    exponents = np.ceil(np.log2(largest / 448))
    codes = (blocks / np.exp2(exponents)).reshape(values.shape).astype(ml_dtypes.float8_e4m3fn)
    folder.store(f"{module}.weight", codes)
    file = folder.tensors()[f"{module}.weight"].file
    folder.add(f"{module}.weight_scale_inv", (exponents[..., 0] + 127).astype(np.uint8), file=file)
    others = [
        m
        for m, p in folder.modules().items()
        if "vision_tower." in m and len(p["weight"].shape) > 1 and m != module
    ]
    declarations(
        folder,
        exclusions(
            lambda listed: [*(p for p in listed if p not in ("vision_tower", module)), *others]
        ),
    )
    return folder.place(f"{module}.weight")


def transposed(folder: Folder) -> Place:
    """Write a quantized projection and its block scale transposed."""
    module = target(folder, DOWNS)
    for name in (f"{module}.weight", block_scale(folder, module)):
        folder.store(name, np.ascontiguousarray(folder.array(name).T))
    return folder.place(f"{module}.weight")


def linear_transposed(folder: Folder) -> Place:
    """Write an unquantized linear as [in, out]."""
    name = f"{plain_linear(folder)}.weight"
    folder.store(name, np.ascontiguousarray(folder.array(name).T))
    return folder.place(name)


def halved_twice(folder: Folder) -> Place:
    """Pack packed codes again: the width is a quarter."""
    name = f"{target(folder)}.weight"
    folder.store(name, np.ascontiguousarray(folder.array(name)[:, ::2]))
    return folder.place(name)


def config_of_another_size(folder: Folder) -> Place:
    """Take config.json from a model with narrower projections."""

    def narrow(value: dict[str, Any]) -> None:
        text = value.get("text_config", value)
        key = "moe_intermediate_size" if "moe_intermediate_size" in text else "intermediate_size"
        text[key] //= 2

    folder.edit_json(CONFIG, narrow)
    return Place()


_RENAMED = ids("402 404 410")
NAMES: tuple[Corruptor, ...] = (
    Corruptor("QC201", "all-names-of-memory", edit(all_in_memory), also=ids("410")),
    Corruptor("QC201", "one-name-of-memory", edit(one_prefix)),
    Corruptor(
        "QC201", "quantized-module-under-another-prefix", edit(quantized_prefix), also=ids("410")
    ),
    Corruptor("QC111", "amax-of-a-quantizer", edit(_leaked("weight_quantizer._amax"))),
    Corruptor("QC111", "scale-of-a-quantizer", edit(_leaked("weight_quantizer._double_scale"))),
    Corruptor("QC111", "amax-of-fused-experts", edit(fused_quantizers), traits=_EXPERTS),
    Corruptor("QC202", "vision-rule-on-all", edit(vision_rule_on_all), also=ids("402 404 410")),
    Corruptor(
        "QC202",
        "text-rule-on-the-tower",
        edit(text_rule_on_the_tower),
        traits=_VISION,
        also=ids("402 404"),
    ),
    Corruptor("QC203", "experts-stacked", edit(experts_stacked), traits=_EXPERTS, also=ids("410")),
    Corruptor("QC203", "qkv-fused", edit(qkv_fused), also=_RENAMED),
    Corruptor(
        "QC204", "expert-leaves", edit(leaves_of_another_family), traits=_EXPERTS, also=ids("410")
    ),
    Corruptor("QC204", "container", edit(container_of_another_family), also=_RENAMED),
    Corruptor("QC205", "norm-lost", edit(norm_lost)),
    Corruptor("QC205", "linear-lost", edit(linear_lost), also=ids("404")),
    Corruptor(
        "QC206", "mtp-lost", edit(_mtp_lost(None)), needs=("base",), traits=frozenset({"mtp"})
    ),
    Corruptor(
        "QC206", "mtp-tensor-lost", edit(_mtp_lost(1)), needs=("base",), traits=frozenset({"mtp"})
    ),
    Corruptor("QC207", "expert-lost", edit(expert_lost), traits=_EXPERTS),
    Corruptor("QC207", "expert-projection-lost", edit(expert_projection_lost), traits=_EXPERTS),
    Corruptor("QC207", "layer-without-experts", edit(layer_of_experts_lost), traits=_EXPERTS),
    Corruptor("QC208", "quantized-transposed", edit(transposed), also=ids("306")),
    Corruptor("QC208", "linear-transposed", edit(linear_transposed)),
    Corruptor("QC208", "halved-twice", edit(halved_twice), formats=NVFP4, also=ids("306")),
    Corruptor("QC208", "config-of-another-size", edit(config_of_another_size)),
    Corruptor(
        "QC209", "tower-excluded-by-wrapper", edit(tower_excluded_by_wrapper), traits=_VISION
    ),
    Corruptor(
        "QC209",
        "router-excluded-by-wrapper",
        edit(router_excluded_by_wrapper),
        formats=UNIFORM,
        also=ids("402"),
    ),
    Corruptor("QC209", "wrapped-norm", edit(wrapped_norm)),
    Corruptor("QC209", "wrapped-tower", edit(wrapped_tower), traits=_VISION),
    Corruptor(
        "QC209", "tower-quantized", edit(tower_quantized), traits=_VISION, severity="warning"
    ),
)
