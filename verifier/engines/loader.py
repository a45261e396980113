# SPDX-License-Identifier: Apache-2.0
"""Depth engine: a checkpoint in vLLM's own loader on a CPU, in a process of its own interpreter
(`vllm_worker`).

The result is plain data (`verifier.rules.engine_loading`), which the rules QC601 to QC603 check.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.engines.process import LineProcess
from verifier.errors import MachineError
from verifier.memory import free_memory
from verifier.rules.engine_loading import BadScale, Cast, EngineLoad, EngineLoads, Unwritten

WORKER = Path(__file__).with_name("vllm_worker.py")
TRIED = ("0.31.0", "0.32.0")
"""The versions of vLLM that `tests/engines` was run with: 0.31.0 with the goldens only."""
MEMORY = 2.5
"""Memory of a load, as a factor of the checkpoint's bytes."""
_WHO = "the vLLM process"
_ANSWER_BYTES = 64 << 20
_LAYER = re.compile(r"^(?!.*(?:vision|visual|audio)).*?\blayers\.(\d+)\.(.+)$")
"""A tensor of a layer of the text model."""


@dataclass(frozen=True, slots=True)
class VllmLoader:
    """Loads checkpoints with vLLM.

    Args:
        python: an interpreter with vLLM; ckptgate need not be installed there.
        layers: build only the first layers; by default all of them, or where they do not fit into
            memory the fewest that show every kind of layer.
        timeout: seconds that vLLM may take for each checkpoint.
    """

    python: str
    layers: int | None = None
    timeout: float = 1800.0

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> EngineLoads:
        """Load a checkpoint and its base.

        Raises:
            UsageError: the interpreter cannot be started.
            MachineError: it has no vLLM, or the process fails or does not answer in time.
        """
        with closing(VllmSession(self)) as session:
            return session(checkpoint, base)


class VllmSession:
    """A running vLLM process that loads any number of checkpoints."""

    def __init__(self, loader: VllmLoader) -> None:
        """Start the process; errors are those of `VllmLoader`."""
        self._loader = loader
        self._process = LineProcess(loader.python, WORKER, _WHO, loader.timeout)
        try:
            self.engine = _ready(self._process)
        except BaseException:
            self.close()
            raise

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> EngineLoads:
        """Load a checkpoint and its base."""
        candidate = self.load(checkpoint, checkpoint)
        if base is None or candidate.reason:
            return EngineLoads(candidate)
        return EngineLoads(candidate, self.load(base, checkpoint))

    def load(self, checkpoint: Checkpoint, sized: Checkpoint) -> EngineLoad:
        """Return what vLLM makes of a checkpoint; ``sized`` decides how many layers are built."""
        if checkpoint.source.remote or not os.path.isdir(checkpoint.uri):
            return EngineLoad(self.engine, reason=f"{checkpoint.uri} is not a local directory")
        layers = self._loader.layers
        layers = layers if layers is not None else layers_that_fit(sized)
        if layers == 0:
            need = MEMORY * sized.nbytes / 1e9
            return EngineLoad(self.engine, reason=f"loading takes {need:,.1f} GB of memory")
        question = {"id": 1, "model": os.path.abspath(checkpoint.uri), "layers": layers}
        answer = self._process.ask(question, _ANSWER_BYTES)
        loaded = answer.get("loaded")
        if answer.get("id") != 1 or not isinstance(loaded, dict):
            raise MachineError(f"{_WHO}: an answer to another question")
        return load_of(self.engine, loaded, layers)

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _ready(process: LineProcess) -> str:
    """Return the engine's name and version."""
    ready = process.ask({"ckptgate": 1}, 1 << 16).get("ready")
    if not isinstance(ready, dict) or not isinstance(ready.get("engine"), str):
        raise MachineError(f"{_WHO}: did not report that it is ready")
    engine = str(ready["engine"])[:80]
    version = engine.partition(" ")[2]
    if version.startswith(tuple(".".join(v.split(".")[:2]) + "." for v in TRIED)):
        return engine
    return f"{engine} (tried with {', '.join(TRIED)})"


def load_of(engine: str, answer: Mapping[str, Any], layers: int | None) -> EngineLoad:
    """Return the worker's answer as an object.

    Raises:
        MachineError: a field is missing or of the wrong type.
    """
    try:
        error, stage = str(answer.get("error", "")), str(answer.get("stage", ""))
        if answer.get("unbuildable"):
            return EngineLoad(engine, reason=f"{stage} fails on a CPU: {error}", layers=layers)
        return EngineLoad(
            engine,
            stage=stage,
            error=error,
            place=str(answer.get("place", "")),
            layers=layers,
            architecture=str(answer.get("architecture", "")),
            parameters=int(answer.get("parameters", 0)),
            tensors=int(answer.get("tensors", 0)),
            unwritten=tuple(
                Unwritten(**{**item, "tensors": tuple(item["tensors"])})
                for item in answer.get("unwritten", ())
            ),
            unused=tuple(map(str, answer.get("unused", ()))),
            casts=tuple(Cast(**item) for item in answer.get("casts", ())),
            bad_scales=tuple(BadScale(**item) for item in answer.get("bad_scales", ())),
            warnings=tuple(map(str, answer.get("warnings", ()))),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise MachineError(f"{_WHO}: not an answer about a load ({error})") from error


def layers_that_fit(checkpoint: Checkpoint) -> int | None:
    """Return how many layers to build: None for all, 0 where none fit into memory."""
    if checkpoint.nbytes * MEMORY <= free_memory():
        return None
    layers = kinds_of_layers(checkpoint)
    size = sum(t.nbytes for n, t in checkpoint.tensors.items() if _layer_number(n) < layers)
    return layers if layers and size * MEMORY <= free_memory() else 0


def kinds_of_layers(checkpoint: Checkpoint) -> int:
    """Return the fewest first layers among which every kind of layer is.

    Layers are of one kind if they have the same names, dtypes and shapes.
    """
    layers: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _LAYER.match(name)
        if match:
            layers.setdefault(int(match[1]), []).append((match[2], tensor.dtype, tensor.shape))
    first: dict[frozenset[tuple[str, str, tuple[int, ...]]], int] = {}
    for number, tensors in sorted(layers.items()):
        first.setdefault(frozenset(tensors), number)
    return max(first.values(), default=-1) + 1


def _layer_number(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else 0
