# SPDX-License-Identifier: Apache-2.0
"""Detect fused experts in a model, or in the model that a config stands for, built without
memory.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from exporter.detect.layouts import (
    FLAGS,
    ExpertStack,
    FusedLinear,
    Refused,
    by_flags,
    by_shapes,
    parameters,
)
from exporter.detect.registry import READERS, load_plugins
from verifier.checkpoint import open_checkpoint, special_floats
from verifier.checkpoint.address import is_local
from verifier.errors import ContentError, UsageError


@dataclass(frozen=True)
class Detection:
    """What a model holds: stacks of routed experts, dense fused linears, and what is refused."""

    model_type: str
    stacks: tuple[ExpertStack, ...]
    fused: tuple[FusedLinear, ...]
    refused: tuple[Refused, ...]

    @property
    def linears(self) -> int:
        """The routed experts' linear layers, as the hub counts them."""
        return sum(s.linears for s in self.stacks)

    def layouts(self) -> Counter[str]:
        """Return how many layers have each layout, in words."""
        return Counter(_words(s) for s in self.stacks)


def _words(stack: ExpertStack) -> str:
    gate = (
        ("gate and up interleaved" if stack.interleaved else "gate before up")
        if stack.gated
        else "not gated"
    )
    axes = "transposed [experts, in, out]" if stack.transposed else "[experts, out, in]"
    more = ", with bias" if stack.bias else ""
    return f"{stack.cls}: {stack.experts:,} experts, {axes}, {gate}{more}, hidden {stack.hidden:,} x {stack.intermediate:,}"


def detect(model: Any) -> Detection:
    """Return what a transformers model holds; nothing is changed, and parameters may be on the meta
    device.

    A module is read by its class where that is registered, else by the flags of transformers'
    experts decorator, else by its shapes where they admit one reading; every other module that
    looks like experts is refused by name.
    """
    load_plugins()
    stacks: list[ExpertStack] = []
    fused: list[FusedLinear] = []
    refused: list[Refused] = []
    text = model.config.get_text_config()
    hidden = getattr(text, "hidden_size", None)
    for path, module in model.named_modules():
        found: ExpertStack | Refused | None = None
        if type(module).__name__ in READERS:
            found = READERS[type(module).__name__](path, module)
        elif all(flag in vars(module) for flag in FLAGS):
            found = by_flags(path, module)
        elif isinstance(module, torch.nn.Linear):
            if path.rpartition(".")[2] == "gate_up_proj":
                fused.append(FusedLinear(path, tuple(module.weight.shape)))
        else:
            found = by_shapes(path, module, hidden) or _suspect(path, module)
        if isinstance(found, ExpertStack):
            stacks.append(found)
        elif found is not None:
            refused.append(found)
    return Detection(str(model.config.model_type), tuple(stacks), tuple(fused), tuple(refused))


def _suspect(path: str, module: Any) -> Refused | None:
    """Return why a module that is called experts and holds 3-D parameters of its own is refused."""
    if "expert" not in path.lower() and "expert" not in type(module).__name__.lower():
        return None
    odd = [f"{n} {list(s)}" for n, s in parameters(module).items() if len(s) == 3]
    if not odd:
        return None
    return Refused(
        path, type(module).__name__, f"holds {', '.join(odd)} in a layout that is not known"
    )


def detect_config(path: Path | str) -> Detection:
    """Return what the model of a config.json (or of a directory or remote checkpoint with one)
    holds; it is built on the meta device.

    Raises:
        UsageError: no such file.
        ContentError: no JSON, or a config or architecture that transformers does not have.
    """
    if not is_local(path):
        checkpoint = open_checkpoint(path)
        if checkpoint.config is None:
            raise ContentError(f"{checkpoint.uri}: no config.json")
        return detect(meta_model(checkpoint.uri, checkpoint.config))
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UsageError(f"{path}: no config.json there")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{file}: not JSON") from error
    if not isinstance(raw, dict):
        raise ContentError(f"{file}: not a JSON object")
    return detect(meta_model(file, raw))


def meta_model(file: Path | str, raw: Mapping[str, Any]) -> Any:
    """Return the model that a config stands for, on the meta device.

    Args:
        file: where the config is from, for messages.
        raw: the config.

    Raises:
        ContentError: a config or architecture that transformers does not have.
    """
    # transformers 5.12 takes what it reads out of nested objects.
    kept = {k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map")}
    given = special_floats(copy.deepcopy(kept))
    version = transformers.__version__
    if (
        not isinstance(raw.get("model_type"), str)
        or raw["model_type"] not in transformers.CONFIG_MAPPING
    ):
        raise ContentError(
            f"{file}: transformers {version} has no model_type {raw.get('model_type')!r}"
        )
    try:
        config = transformers.AutoConfig.for_model(**given)
        architecture = next(iter(config.architectures or ()), None)
        cls = getattr(transformers, architecture or "", None)
        known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        auto: Any = (
            transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
        )
        with torch.device("meta"):
            return cls(config) if cls is not None else auto.from_config(config)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        StrictDataclassError,
    ) as error:
        said = " ".join(str(error).split())[:160]
        raise ContentError(
            f"{file}: transformers {version} cannot build its model: {said}"
        ) from error
