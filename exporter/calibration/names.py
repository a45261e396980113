# SPDX-License-Identifier: Apache-2.0
"""Where the modules of a hub checkpoint are in transformers' model, and where their inputs can be
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from exporter.calibration.attention import KvSpot
from exporter.layout import read_stacks
from exporter.layout.hf_mapping import Place
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import expert_key, role

Kind = Literal["linear", "gate_up", "down"]
OUTSIDE = ("dbrx", "inkling", "jetmoe", "llama4", "llama4_text", "longcat_flash", "step3p7")
"""Model types with stacked experts whose class does not call transformers' experts interface
(transformers 5.23)."""
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "config")
_NO_CACHE = ("vision", "projector", "indexer", "mtp")
_STACKS: Mapping[str, Kind] = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


@dataclass(frozen=True, slots=True)
class Target:
    """A module to read: its hub name, the module in memory, what that is, and which slot of it (the
    expert).
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
            f"{checkpoint.uri}: {checkpoint.model_type} is outside transformers' experts interface, so the inputs of its "
            f"experts cannot be read; not supported: {', '.join(OUTSIDE)}"
        )


def targets(model: Any, where: Mapping[str, Place], wanted: Iterable[str]) -> list[Target]:
    """Return where to read the input of each wanted hub module.

    Args:
        model: the model that transformers built.
        where: the places of the source's tensors.
        wanted: hub module names.

    Raises:
        PlanError: a module that the model does not have, or that is of a kind that cannot be read;
            it is named.
    """
    state = model.state_dict()
    experts: dict[str, set[int]] = {}
    for name in where:
        key = expert_key(name.removesuffix(".weight"))
        if key is not None:
            experts.setdefault(key.container, set()).add(key.expert)
    found = []
    for hub in wanted:
        place = where[f"{hub}.weight"]
        if place.key not in state:
            raise PlanError(
                f"{hub} is in the source and not in transformers' {type(model).__name__}, so it sees no input; a recipe "
                "that leaves it out can be calibrated"
            )
        path, _, leaf = place.key.rpartition(".")
        module, key = model.get_submodule(path), expert_key(hub)
        if isinstance(module, torch.nn.Linear) and leaf == "weight":
            found.append(Target(hub, path, "linear", 0))
        elif (
            key is not None
            and state[place.key].ndim == 3
            and _interface(module)
            and leaf in _STACKS
        ):
            count = state[place.key].shape[0]
            if experts[key.container] != set(range(count)):
                raise PlanError(
                    f"{key.container}: its expert numbers are not 0 to {count - 1}, as transformers stacks them"
                )
            found.append(Target(hub, path, _STACKS[leaf], key.expert))
        else:
            raise PlanError(
                f"{hub} is {place.key} of a {type(module).__name__} in transformers: neither a linear layer nor experts "
                "that call its experts interface, so its input cannot be read"
            )
    return found


def with_experts(where: Mapping[str, Place], checkpoint: Checkpoint) -> dict[str, Place]:
    """Return places with those of the linears that a checkpoint holds in stacks: an expert's is
    that of its stack.
    """
    stacks = read_stacks(checkpoint)
    found = dict(where)
    for stack in stacks.stacks if stacks is not None else ():
        if stack.key in where:
            found |= {f"{m}.weight": Place(where[stack.key].key, True) for m in stack.members}
    return found


def _interface(module: Any) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS)


def kv_targets(model: Any, where: Mapping[str, Place]) -> dict[str, KvSpot]:
    """Return what of the KV cache each ``<hub k_proj>.k_amax`` and ``<hub v_proj>.v_amax`` is, in
    the language model.
    """
    found: dict[str, KvSpot] = {}
    for name, place in where.items():
        hub, _, leaf = name.rpartition(".")
        kind = hub.rpartition(".")[2]
        path, _, inner = place.key.rpartition(".")
        if leaf != "weight" or kind not in ("k_proj", "v_proj") or role(hub) in _NO_CACHE:
            continue
        number = _layer_index(model, path.rpartition(".")[0])
        if place.converted or inner != "weight" or number is None:
            continue
        found[f"{hub}.{kind[0]}_amax"] = (number, "k" if kind == "k_proj" else "v")
    return found


def _layer_index(model: Any, path: str) -> int | None:
    """Return the number under which an attention module stores its states in the cache."""
    try:
        number = getattr(model.get_submodule(path), "layer_idx", None)
    except AttributeError:
        return None
    return number if isinstance(number, int) else None
