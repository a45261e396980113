# SPDX-License-Identifier: Apache-2.0
"""What goes to a scoring process, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

from verifier.errors import UsageError

Protocol = Literal["tokens", "lm-eval", "task"]
PROTOCOLS: dict[str, Protocol] = {"tokens": "tokens", "lm-eval": "lm-eval"}
Window = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids, and for each the number of the document that it belongs to."""
Array = npt.NDArray[Any]


def protocol_of(name: str) -> Protocol:
    """Return the protocol of an option: any other name than tokens and lm-eval is a task."""
    return PROTOCOLS.get(name, "task")


@dataclass(frozen=True)
class Unit:
    """What is scored as one batch. It is fixed before workers share the work, so the same unit
    gives the same bits anywhere.

    ``places`` are the numbers of its windows in the corpus (protocol ``tokens``); ``texts`` are its
    documents with their numbers (``lm-eval``, tasks).
    """

    number: int
    windows: tuple[Window, ...] = ()
    places: tuple[int, ...] = ()
    texts: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.windows) + len(self.texts)


@dataclass(frozen=True)
class Scorer:
    """What turns token ids into log-probabilities.

    ``hf``: transformers in a worker process, with weights decoded by the verifier; with
    ``activations="declared"``, inputs are rounded as the checkpoint declares; with ``shared``,
    the experts of a layer share the largest input scale, as vLLM loads them. ``vllm``: vLLM under
    the interpreter ``python``, with ``options`` for its ``LLM``. ``server``: the model ``served``
    at the OpenAI-style ``endpoint``. Engines round activations in their own way, which is called
    ``engine``.

    Args:
        timeout: seconds that an engine may take to start, and for each unit.
    """

    name: Literal["hf", "vllm", "server"] = "hf"
    activations: Literal["bf16", "declared", "shared"] = "bf16"
    python: str = ""
    endpoint: str = ""
    served: str = ""
    options: tuple[tuple[str, str | int | float | bool], ...] = ()
    timeout: float = 1800.0

    @property
    def key(self) -> dict[str, str]:
        """What the scorer adds to the protocol key; BF16 activations, which the first runs had, add
        nothing.
        """
        activations = "engine" if self.name != "hf" else self.activations
        return {} if activations == "bf16" else {"activations": activations}

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: naming the option.
        """
        if self.name not in ("hf", "vllm", "server"):
            raise UsageError(f"unknown scorer {self.name!r}; available: hf, vllm, server")
        if self.activations not in ("bf16", "declared", "shared"):
            raise UsageError(
                f"unknown activations {self.activations!r}; available: bf16, declared, shared"
            )
        if self.name != "hf" and self.activations != "bf16":
            raise UsageError(
                f"--activations needs --scorer hf; {self.name} rounds activations as the engine "
                "does"
            )
        if self.name == "vllm" and not self.python:
            raise UsageError("--scorer vllm needs --engine-python PATH, an interpreter with vLLM")
        if self.name == "server" and not self.endpoint:
            raise UsageError("--scorer server needs --endpoint URL")
        if self.python and self.name != "vllm":
            raise UsageError("--engine-python needs --scorer vllm")
        if (self.endpoint or self.served) and self.name != "server":
            raise UsageError("--endpoint and --served need --scorer server")
        if self.options and self.name != "vllm":
            raise UsageError("--engine-option needs --scorer vllm")
        if not 0 < self.timeout <= 86_400:
            raise UsageError("--engine-timeout must be above 0 and at most 86400 seconds")


HF = Scorer()


@dataclass(frozen=True)
class TaskInfo:
    """A task of lm-eval: how to load it, and which of its metrics, after which filter, marks
    answers right or wrong.

    ``chance`` is the share of right answers that guessing gives; None where it is not known.
    ``digest`` is that of prompts, metrics, filters and generation options. ``repeats``: how often
    each document is answered, every answer a document of the corpus.
    """

    spec: str
    name: str
    version: str
    shots: int
    metric: str
    filter: str
    chance: float | None = None
    digest: str = ""
    repeats: int = 1


@dataclass(frozen=True)
class Job:
    """What one worker does: score some units with one model, or with a model and its base in
    lockstep.
    """

    model: str
    device: str
    protocol: Protocol
    batch: int
    seq_len: int
    units: tuple[Unit, ...] = ()
    base: str | None = None
    top_k: int = 0
    scorer: Scorer = HF
    task: TaskInfo | None = None

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows of the job."""
        return tuple(window for unit in self.units for window in unit.windows)


@dataclass
class UnitScores:
    """The scores of one unit.

    Protocol ``tokens``: arrays over its scored tokens, window by window: ``nats`` float32, ``top1``
    int32 (the top token), ``sure`` float32 (its log-probability); with ``top_k``, ``top_ids`` int32
    and ``top_logprobs`` float32, both [tokens, k]; in lockstep ``kl`` float64 (KL(base || model),
    nats) and the base's arrays as ``base_nats`` and so on. ``lm-eval``: ``nats`` float64 and
    ``words`` int64 per document. A task: ``nats`` 1 for wrong and 0 for right, ``words`` 1; where
    it generates, ``completion`` int64 (tokens) and ``finish`` int32 (how it ends, numbered as in
    `verifier.gate.scorers.completions`).

    ``nonfinite`` and ``nonfinite_base`` are documents with logits that are not finite; ``experts``
    counts the tokens of each expert by layer.
    """

    unit: int
    arrays: dict[str, Array]
    nonfinite: list[int] = field(default_factory=list)
    experts: dict[str, list[int]] = field(default_factory=dict)
    nonfinite_base: list[int] = field(default_factory=list)
