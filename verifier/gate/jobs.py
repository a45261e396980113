# SPDX-License-Identifier: Apache-2.0
"""What goes to a scoring process and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

from verifier.errors import UsageError

Window = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids, and for each the document that it belongs to."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Unit:
    """What is scored as one batch, fixed before workers share the work: the same unit gives the
    same bits anywhere.

    ``places`` are the numbers of its windows in the corpus (``tokens``), ``texts`` its documents
    (``lm-eval``).
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

    ``hf``: transformers in a worker process, weights decoded by the verifier; with
    ``activations="declared"`` inputs are rounded as the checkpoint declares. ``vllm``: vLLM under
    the interpreter ``python``, with ``options`` for its ``LLM``. ``server``: the model ``served``
    at the OpenAI-style ``endpoint``. Engines round as they do: activations ``engine``.

    Args:
        timeout: seconds that an engine may take to start, and for one unit of work.
    """

    name: Literal["hf", "vllm", "server"] = "hf"
    activations: Literal["bf16", "declared"] = "bf16"
    python: str = ""
    endpoint: str = ""
    served: str = ""
    options: tuple[tuple[str, str | int | float | bool], ...] = ()
    timeout: float = 1800.0

    @property
    def key(self) -> dict[str, Any]:
        """What it adds to the protocol key; BF16 activations, which the first runs had, are not
        named.
        """
        rounded = "engine" if self.name != "hf" else self.activations
        return {} if rounded == "bf16" else {"activations": rounded}

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: naming the option.
        """
        if self.name not in ("hf", "vllm", "server"):
            raise UsageError(f"no scorer {self.name!r}; hf, vllm or server")
        if self.activations not in ("bf16", "declared"):
            raise UsageError(f"no activations {self.activations!r}; bf16 or declared")
        if self.name != "hf" and self.activations != "bf16":
            raise UsageError(
                f"--activations is for the scorer hf; {self.name} rounds activations as the engine does"
            )
        if self.name == "vllm" and not self.python:
            raise UsageError(
                "--scorer vllm needs --engine-python PATH: the interpreter that has vLLM"
            )
        if self.name == "server" and not self.endpoint:
            raise UsageError("--scorer server needs --endpoint URL")
        if (self.python and self.name != "vllm") or (
            (self.endpoint or self.served) and self.name != "server"
        ):
            raise UsageError(
                "--engine-python is for the scorer vllm, --endpoint and --served are for server"
            )
        if self.options and self.name != "vllm":
            raise UsageError("--engine-option is for the scorer vllm")
        if not 0 < self.timeout <= 86_400:
            raise UsageError("--engine-timeout is above 0 and at most 86400 seconds")


HF = Scorer()


@dataclass(frozen=True)
class TaskInfo:
    """A task of lm-eval: how to load it, and which of its metrics, after which filter, says right
    or wrong.
    """

    spec: str
    name: str
    version: str
    shots: int
    metric: str
    filter: str


@dataclass(frozen=True)
class Job:
    """What one worker does: score some units with one model, or with a model and its base in
    lockstep.
    """

    model: str
    device: str
    protocol: Literal["tokens", "lm-eval", "task"]
    batch: int
    window: int
    documents: int
    units: tuple[Unit, ...] = ()
    base: str | None = None
    top_k: int = 0
    scorer: Scorer = HF
    task: TaskInfo | None = None

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows of the job."""
        return tuple(w for u in self.units for w in u.windows)


@dataclass
class Piece:
    """What one unit gave.

    ``tokens``: arrays over its scored tokens, window by window: ``nats`` float32, ``top1`` int32
    (the likeliest token), ``sure`` float32 (its log-probability), where asked ``top_ids`` int32 and
    ``top_logprobs`` float32 [tokens, k]; in lockstep ``kl`` float64 (KL(base || model), nats) and
    the base's arrays as ``base_nats`` and so on. ``lm-eval``: ``nats`` float64 and ``words`` int64
    over its documents; a task: 1 for wrong, 0 for right, and 1.
    """

    unit: int
    arrays: dict[str, Array]
    nonfinite: list[int] = field(default_factory=list)
    experts: dict[str, list[int]] = field(default_factory=dict)
    nonfinite_base: list[int] = field(default_factory=list)


@dataclass
class Sums:
    """Per document: nats, scored tokens (``lm-eval``: words), and the documents with logits that
    are not finite.
    """

    nats: list[float]
    tokens: list[int]
    nonfinite: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of other windows; per-document sums are additive."""
        self.nats = [a + b for a, b in zip(self.nats, other.nats, strict=True)]
        self.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        self.nonfinite = sorted({*self.nonfinite, *other.nonfinite})
        self.environment |= other.environment
