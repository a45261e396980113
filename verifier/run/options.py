# SPDX-License-Identifier: Apache-2.0
"""The options of a check, and how bytes are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from verifier.errors import UsageError
from verifier.evaluation import Evaluate
from verifier.progress import Progress, no_progress
from verifier.rules import DEPTHS, Depth
from verifier.run.sample import Sample, sample_of
from verifier.run.select import Prefixes, nearest
from verifier.run.severity import Levels
from verifier.run.subset import Subset, subset_of
from verifier.summary import FAIL_ON, WEIGHTS, FailOn

Path = str | os.PathLike[str]
MAX_WORKERS = 64
DEFAULT_WORKERS = 4


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The engine of depth engine.

    Args:
        python: an interpreter in which the engine is installed; ckptgate need not be.
        name: ``vllm``.
        layers: build only the first layers; by default all of them, or where they do not fit into
            memory the fewest that show every kind of layer.
        timeout: seconds that the engine may take for each checkpoint.
    """

    python: str
    name: Literal["vllm"] = "vllm"
    layers: int | None = None
    timeout: float = 1800.0

    def validate(self) -> None:
        """Refuse values that are out of range.

        Raises:
            UsageError: the first that is wrong.
        """
        if self.name != "vllm":
            raise UsageError(f"no engine {self.name!r}; available: vllm")
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"cannot build {self.layers} layers; 1 or more")
        if not 0 < self.timeout <= 86_400:
            raise UsageError("--engine-timeout must be above 0 and at most 86400 seconds")


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The options of `verifier.check`, which documents each."""

    plugins: tuple[Path, ...] = ()
    base: Path | None = None
    merged_from: Path | None = None
    depth: Depth = "header"
    require: Prefixes = ()
    fail_on: FailOn = "error"
    select: Prefixes = ()
    ignore: Prefixes = ()
    profile: str | None = None
    severity: Levels | None = None
    baseline: Path | None = None
    tp: int | None = None
    ep: int | None = None
    workers: int | None = None
    subset: str | None = None
    sample: str | float | None = None
    seed: int = 0
    weights: str | None = None
    evaluate: Evaluate | None = None
    progress: Progress = no_progress
    engine: EngineOptions | None = None

    def validate(self) -> None:
        """Refuse options that are wrong by themselves or contradict one another.

        Raises:
            UsageError: the first that is wrong.
        """
        if self.depth not in DEPTHS:
            raise UsageError(f"no depth {self.depth!r}; one of {', '.join(DEPTHS)}")
        if self.depth == "eval" and self.base is None:
            raise UsageError("depth eval needs a base: the loss is measured over it")
        if self.weights not in (None, *WEIGHTS):
            near = nearest(str(self.weights), WEIGHTS)
            raise UsageError(f"no weights {self.weights!r}; {near}one of {', '.join(WEIGHTS)}")
        if (self.depth == "engine") != (self.engine is not None):
            needs = "an interpreter with the engine (--engine-python)"
            raise UsageError(
                f"depth engine needs {needs}"
                if self.engine is None
                else "--engine-python needs --depth engine: no other depth loads with an engine"
            )
        if self.engine is not None:
            self.engine.validate()
        if self.fail_on not in FAIL_ON:
            raise UsageError(f"cannot fail on {self.fail_on!r}; {' or '.join(FAIL_ON)}")
        for name, size in (("tp", self.tp), ("ep", self.ep)):
            if size is not None and size < 1:
                raise UsageError(f"cannot serve with {name} = {size}; 1 or more")
        if self.subset is not None and self.baseline is not None:
            raise UsageError(
                "--subset and --baseline: a baseline counts the defects of all modules"
            )


@dataclass(frozen=True, slots=True)
class Reading:
    """How bytes are read: by how many workers, and which of them."""

    workers: int = 1
    subset: Subset | None = None
    sample: Sample | None = None

    @property
    def in_first_subset(self) -> bool:
        """Whether rules that need all modules run here."""
        return self.subset is None or self.subset.is_first


def reading_of(options: CheckOptions) -> Reading:
    """Return how a check reads bytes.

    Raises:
        UsageError: no such number of workers, subset or sample; a subset and a sample; one of both
            at depth header.
    """
    subset, sample = options.subset, options.sample
    reading = Reading(
        workers_of(options.workers),
        subset_of(subset) if subset is not None else None,
        sample_of(sample, options.seed) if sample is not None else None,
    )
    if subset is not None and sample is not None:
        raise UsageError("--subset and --sample: one of both; a subset reads all of its modules")
    if options.depth == "header" and (subset is not None or sample is not None):
        option = "--subset" if subset is not None else "--sample"
        raise UsageError(f"{option} needs --depth payload: a header check reads no bytes")
    return reading


def workers_of(workers: int | None) -> int:
    """Return the number of workers; by default the processors that this process may use, at most
    `DEFAULT_WORKERS`.

    Raises:
        UsageError: none, or more than `MAX_WORKERS`.
    """
    if workers is None:
        if hasattr(os, "sched_getaffinity"):
            return min(DEFAULT_WORKERS, len(os.sched_getaffinity(0)))
        return min(DEFAULT_WORKERS, os.cpu_count() or 1)
    if not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"{workers} workers; 1 to {MAX_WORKERS}")
    return workers
