# SPDX-License-Identifier: Apache-2.0
"""Detect fused experts in a model, or in the model of a config, built on the meta device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from exporter.detect.layouts import (
    ExpertStack,
    FusedLinear,
    Refused,
    by_flags,
    by_shapes,
    parameters,
)
from exporter.detect.registry import READERS, load_plugins
from verifier.checkpoint import open_checkpoint
from verifier.checkpoint.address import is_local
from verifier.errors import ContentError, UsageError
from verifier.load import hf
from verifier.load.experts import FLAGS


@dataclass(frozen=True)
class Detection:
    """The stacks of routed experts, dense fused linear layers and refused modules of a model."""

    model_type: str
    stacks: tuple[ExpertStack, ...]
    fused: tuple[FusedLinear, ...]
    refused: tuple[Refused, ...]

    @property
    def linears(self) -> int:
        """The number of linear layers of the routed experts on the hub."""
        return sum(s.linears for s in self.stacks)

    def layouts(self) -> Counter[str]:
        """Return the number of layers per layout, described in words."""
        return Counter(_words(s) for s in self.stacks)


def _words(stack: ExpertStack) -> str:
    if stack.gated:
        gate = "gate and up interleaved" if stack.interleaved else "gate before up"
    else:
        gate = "not gated"
    axes = "transposed [experts, in, out]" if stack.transposed else "[experts, out, in]"
    bias = ", with bias" if stack.bias else ""
    return (
        f"{stack.cls}: {stack.experts:,} experts, {axes}, {gate}{bias}, "
        f"hidden {stack.hidden:,} x {stack.intermediate:,}"
    )


def detect(model: Any) -> Detection:
    """Find the experts of a transformers model, whose parameters may be on the meta device.

    A module is read by its class if that is registered, else by the flags of transformers' experts
    decorator, else by its shapes if they are unambiguous; every other module that looks like
    experts is refused by name.
    """
    load_plugins()
    stacks: list[ExpertStack] = []
    fused: list[FusedLinear] = []
    refused: list[Refused] = []
    text = model.config.get_text_config()
    hidden = getattr(text, "hidden_size", None)
    for path, module in model.named_modules():
        result: ExpertStack | Refused | None = None
        if type(module).__name__ in READERS:
            result = READERS[type(module).__name__](path, module)
        elif all(flag in vars(module) for flag in FLAGS):
            result = by_flags(path, module)
        elif isinstance(module, torch.nn.Linear):
            if path.rpartition(".")[2] == "gate_up_proj":
                fused.append(FusedLinear(path, tuple(module.weight.shape)))
        else:
            result = by_shapes(path, module, hidden) or _suspect(path, module)
        if isinstance(result, ExpertStack):
            stacks.append(result)
        elif result is not None:
            refused.append(result)
    return Detection(str(model.config.model_type), tuple(stacks), tuple(fused), tuple(refused))


def _suspect(path: str, module: Any) -> Refused | None:
    """Refuse a module that is named after experts and has 3-D parameters of its own."""
    if "expert" not in path.lower() and "expert" not in type(module).__name__.lower():
        return None
    stacks = [f"{n} {list(s)}" for n, s in parameters(module).items() if len(s) == 3]
    if not stacks:
        return None
    return Refused(path, type(module).__name__, f"the layout of {', '.join(stacks)} is not known")


def detect_config(path: Path | str) -> Detection:
    """Find the experts of the model of a config.json, or of a directory or remote checkpoint with
    one; the model is built on the meta device.

    Raises:
        UsageError: no such file.
        ContentError: not JSON, or a config or architecture that transformers does not know.
    """
    if not is_local(path):
        checkpoint = open_checkpoint(path)
        if checkpoint.config is None:
            raise ContentError(f"{checkpoint.uri}: no config.json")
        return detect(meta_model(checkpoint.uri, checkpoint.config))
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UsageError(f"{path}: no config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{file}: not JSON") from error
    if not isinstance(raw, dict):
        raise ContentError(f"{file}: not a JSON object")
    return detect(meta_model(file, raw))


def meta_model(file: Path | str, raw: Mapping[str, Any]) -> Any:
    """Return the model of a config, on the meta device.

    Args:
        file: where the config is from, for messages.
        raw: the config.

    Raises:
        ContentError: a config or architecture that transformers does not know.
    """
    config = hf.read_config(str(file), raw)
    cls = getattr(transformers, hf.architecture_of(config) or "", None)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = (
        transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    )
    try:
        with torch.device("meta"):
            return cls(config) if cls is not None else auto.from_config(config)
    except hf.BUILD_ERRORS as error:
        raise ContentError(
            f"{file}: transformers {transformers.__version__} cannot build the model: "
            f"{hf.one_line(error)}"
        ) from error
