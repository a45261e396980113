# SPDX-License-Identifier: Apache-2.0
"""Which modules of transformers' model are those of a hub checkpoint, and where their inputs can be
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from exporter.calibration.attention import KvState
from exporter.layout import stacks_of
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.load.experts import is_experts_module
from verifier.load.hf import ParameterKey
from verifier.schemes import expert_key, role

Kind = Literal["linear", "gate_up", "down"]
OUTSIDE = ("dbrx", "inkling", "jetmoe", "llama4", "llama4_text", "longcat_flash", "step3p7")
"""Model types with stacked experts whose class does not call transformers' experts interface
(transformers 5.23)."""
_NO_CACHE = ("vision", "projector", "indexer", "mtp")
_STACKS: Mapping[str, Kind] = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


@dataclass(frozen=True, slots=True)
class Target:
    """A module to read: its hub name, the path and kind of the module in memory, and its slot there
    (the expert).
    """

    hub: str
    path: str
    kind: Kind
    slot: int


def refuse_outside(checkpoint: Checkpoint) -> None:
    """Refuse the families whose experts transformers' experts interface does not reach.

    Raises:
        PlanError: naming the family.
    """
    if checkpoint.model_type in OUTSIDE:
        raise PlanError(
            f"{checkpoint.uri}: {checkpoint.model_type} does not use transformers' experts "
            "interface, so the inputs of its experts cannot be read; unsupported: "
            f"{', '.join(OUTSIDE)}"
        )


def targets(model: Any, keys: Mapping[str, ParameterKey], modules: Iterable[str]) -> list[Target]:
    """Return where to read the input of each hub module.

    Args:
        model: the model that transformers built.
        keys: which parameter each of the source's tensors is.
        modules: hub module names.

    Raises:
        PlanError: a module that the model does not have, or whose kind cannot be read; it is named.
    """
    state = model.state_dict()
    experts: dict[str, set[int]] = {}
    for name in keys:
        expert = expert_key(name.removesuffix(".weight"))
        if expert is not None:
            experts.setdefault(expert.container, set()).add(expert.expert)
    found = []
    for hub in modules:
        key = keys[f"{hub}.weight"].name
        if key not in state:
            raise PlanError(
                f"{hub} is in the source and not in transformers' {type(model).__name__}, so it "
                "has no input; use a recipe that does not select it"
            )
        path, _, leaf = key.rpartition(".")
        module, expert = model.get_submodule(path), expert_key(hub)
        if isinstance(module, torch.nn.Linear) and leaf == "weight":
            found.append(Target(hub, path, "linear", 0))
            continue
        readable = is_experts_module(module) and leaf in _STACKS and state[key].ndim == 3
        if expert is None or not readable:
            raise PlanError(
                f"{hub} is {key} of a {type(module).__name__} in transformers: neither a linear "
                "layer nor experts that call its experts interface, so its input cannot be read"
            )
        count = state[key].shape[0]
        if experts[expert.container] != set(range(count)):
            raise PlanError(
                f"{expert.container}: its expert numbers are not 0 to {count - 1}, as transformers "
                "stacks them"
            )
        found.append(Target(hub, path, _STACKS[leaf], expert.expert))
    return found


def with_experts(
    keys: Mapping[str, ParameterKey], checkpoint: Checkpoint
) -> dict[str, ParameterKey]:
    """Return parameter keys with those of the linear layers that a checkpoint holds in stacks: an
    expert's is that of its stack.
    """
    result = dict(keys)
    for stack in stacks_of(checkpoint):
        if stack.key in keys:
            result |= {f"{linear}.weight": keys[stack.key] for linear in stack.linears}
    return result


def kv_targets(model: Any, keys: Mapping[str, ParameterKey]) -> dict[str, KvState]:
    """Return which cached states of the language model each ``<hub k_proj>.k_amax`` and ``<hub
    v_proj>.v_amax`` is.
    """
    states: dict[str, KvState] = {}
    for name, key in keys.items():
        hub, _, leaf = name.rpartition(".")
        projection = hub.rpartition(".")[2]
        if leaf != "weight" or projection not in ("k_proj", "v_proj") or role(hub) in _NO_CACHE:
            continue
        path, _, memory_leaf = key.name.rpartition(".")
        number = _layer_index(model, path.rpartition(".")[0])
        if key.converter is not None or memory_leaf != "weight" or number is None:
            continue
        states[f"{hub}.{projection[0]}_amax"] = (number, "k" if projection == "k_proj" else "v")
    return states


def _layer_index(model: Any, path: str) -> int | None:
    """Return the number under which an attention module stores its states in the cache."""
    try:
        number = getattr(model.get_submodule(path), "layer_idx", None)
    except AttributeError:
        return None
    return number if isinstance(number, int) else None
