# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of a merge: another tool's quantized experts, moved byte for
byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from exporter.plan.model import Action, Constant, Copy, Plan, Skipped
from exporter.plan.sound import (
    refuse_stacked,
    require_every_tensor_once,
    require_same_experts,
    require_sound,
)
from verifier.checkpoint import Checkpoint
from verifier.checkpoint.header import read_json
from verifier.errors import PlanError
from verifier.manifest import MANIFEST
from verifier.schemes import Module, expert_key, gather


def merge(
    experts: Checkpoint, onto: Checkpoint, *, input_scale: Literal["keep", "one"] = "keep"
) -> Plan:
    """Return the plan that moves another tool's quantized experts onto a checkpoint, byte for byte.

    Args:
        experts: where the quantized routed experts come from.
        onto: the checkpoint that everything else is kept from.
        input_scale: ``keep`` copies the experts' activation scales; ``one`` writes 1.0.

    Raises:
        PlanError: no quantized experts, unequal expert sets or shapes, a W4A4 expert without an
            input scale to keep.
    """
    for ckpt, owner in ((experts, "experts"), (onto, "onto")):
        require_sound(ckpt, owner)
        refuse_stacked(ckpt)
    sources, targets = gather(experts.tensors.values()), gather(onto.tensors.values())
    require_same_experts(sources, targets, onto)
    moved = {n: m for n, m in sources.items() if expert_key(n) and m.quantized}
    if not moved:
        raise PlanError(f"{experts.uri} holds no quantized routed expert")
    actions: list[Action] = []
    skipped: list[Skipped] = []
    for name, module in targets.items():
        expert = moved.get(name)
        if expert is None:
            actions += [Copy(t, "onto") for t in module.parts.values()]
            continue
        if expert.dims != module.dims:
            raise PlanError(f"{name}: {expert.dims} in {experts.uri}, {module.dims} in {onto.uri}")
        skipped += [("onto", t.name, "replaced") for t in module.parts.values()]
        for leaf, tensor in expert.parts.items():
            if leaf == "input_scale" and input_scale == "one":
                skipped.append(("source", tensor.name, "replaced"))
            else:
                actions.append(Copy(tensor, "source"))
        if input_scale == "one" and _is_packed(expert):
            actions.append(Constant(f"{name}.input_scale", 1.0))
    for name, module in sources.items():
        if name not in moved:
            skipped += [("source", t.name, "kept from onto") for t in module.parts.values()]
    if input_scale == "keep":
        _require_input_scales(moved)
    options: dict[str, object] = {"input_scale": _policy(experts, input_scale)}
    plan = Plan("merge", "merge", experts, onto, tuple(actions), tuple(skipped), options)
    require_every_tensor_once(plan)
    return plan


def _policy(experts: Checkpoint, input_scale: Literal["keep", "one"]) -> str:
    """Return the policy of the activation scales: kept scales that the exporter of the experts
    recorded as 1.0 by policy are so here too.
    """
    size = experts.files.get(MANIFEST)
    if size is None:
        return input_scale
    value, _ = read_json(experts.source, MANIFEST, size)
    options = value.get("options") if value else None
    recorded = options.get("input_scale") if isinstance(options, dict) else None
    return "one" if recorded == "one" else input_scale


def _is_packed(module: Module) -> bool:
    return module.weight is not None and module.weight.dtype == "U8"


def _require_input_scales(moved: Mapping[str, Module]) -> None:
    """Check that all packed experts have an input scale, or none.

    Raises:
        PlanError: naming the first expert without one.
    """
    packed = [n for n, m in moved.items() if _is_packed(m)]
    without = [n for n in packed if "input_scale" not in moved[n].parts]
    if without and len(without) != len(packed):
        raise PlanError(
            f"{without[0]} has no input_scale to keep ({len(without):,} of {len(packed):,}); "
            "--input-scale one writes 1.0"
        )
