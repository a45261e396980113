# SPDX-License-Identifier: Apache-2.0
"""What a gate is asked for, as objects: how checkpoints are scored, and what the scores are held
against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from verifier.errors import UsageError
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import HF, Job, Protocol, Scorer
from verifier.progress import Progress

PathLike = str | os.PathLike[str]
Say = Callable[[str], None]
"""Called with a message for the user."""
KlChoice = Literal["auto", "lockstep", "top-k", "off"]
SEQ_LEN = 512
BATCH = 8
MAX_DEFAULT_WORKERS = 4


def silent(_message: str) -> None:
    """Say nothing."""


def _uncounted(_size: int) -> None:
    """Count nothing."""


@dataclass(frozen=True)
class ScoringOptions:
    """How checkpoints are scored.

    Args:
        corpus: the documents.
        protocol: ``tokens``, ``lm-eval`` or ``task``.
        seq_len: tokens in a window, at least 2.
        batch: windows in a unit of work.
        device: where the models run.
        workers: processes; by default one per CPU (at most 4), or one on another device. They
            change no bit of a result.
        top_k: log-probabilities to keep per token; 0 keeps only the top one.
        scorer: what turns tokens into log-probabilities.
        progress: called with (done, total, detail) documents; one of several windows counts by the
            share of them that is scored.
        on_unit: called with the windows or documents of each unit that is scored.
        say: called with messages for the user.
    """

    corpus: Corpus
    protocol: Protocol = "tokens"
    seq_len: int = SEQ_LEN
    batch: int = BATCH
    device: str = "cpu"
    workers: int | None = None
    top_k: int = 0
    scorer: Scorer = HF
    progress: Progress | None = field(default=None, compare=False)
    on_unit: Callable[[int], None] = field(default=_uncounted, compare=False)
    say: Say = field(default=silent, compare=False)

    def check(self) -> None:
        """Refuse values that are out of range or do not go together.

        Raises:
            UsageError: naming the option.
        """
        self.scorer.check()
        if self.seq_len < 2:
            raise UsageError("seq_len must be at least 2")
        if self.batch < 1 or (self.workers is not None and self.workers < 1):
            raise UsageError("batch and workers must be at least 1")
        if self.scorer.name != "hf" and self.protocol != "tokens":
            raise UsageError(f"--scorer {self.scorer.name} needs the protocol tokens")

    @property
    def processes(self) -> int:
        """How many processes score; an engine is one."""
        if self.scorer.name != "hf":
            return 1
        cpus = os.cpu_count() or 1
        default = min(MAX_DEFAULT_WORKERS, cpus) if self.device == "cpu" else 1
        return self.workers or default

    @property
    def series(self) -> str:
        """What attempts at one pair share besides the sequence length: other rounding, or another
        task, is another question.
        """
        task = self.corpus.task
        parts = [task.name, task.metric, task.filter] if task else []
        return "/".join([self.protocol, *parts, *self.scorer.key.values()])

    def job(self, model: str, base: str | None = None) -> Job:
        """Return the job of scoring a model, without units."""
        return Job(
            model,
            self.device,
            self.protocol,
            self.batch,
            self.seq_len,
            base=base,
            top_k=self.top_k,
            scorer=self.scorer,
            task=self.corpus.task,
        )


@dataclass(frozen=True)
class GateOptions:
    """What a candidate is compared with, besides its base; as in `verifier.gate.run`."""

    scoring: ScoringOptions
    max_increase: str | float | None = None
    drift_against: PathLike | None = None
    max_drift: str | float | None = None
    floor: Sequence[PathLike] = ()
    kl: KlChoice = "auto"
    cache: PathLike | None = None
    max_kl: str | float | None = None

    def check(self) -> None:
        """Refuse values that do not go together.

        Raises:
            UsageError: naming the option.
        """
        self.scoring.check()
        if self.scoring.scorer.name == "server":
            raise UsageError(
                "a server has one model: run `ckptgate score` on base and candidate, each where it "
                "is served, then `ckptgate compare`"
            )
        if self.max_drift is not None and self.drift_against is None:
            raise UsageError("--max-drift needs --drift-against RUN")
        self._check_kl()

    def _check_kl(self) -> None:
        if self.kl not in get_args(KlChoice):
            raise UsageError(f"unknown --kl {self.kl!r}; available: auto, lockstep, top-k, off")
        if self.max_kl is not None and (self.kl == "off" or self.scoring.protocol != "tokens"):
            raise UsageError("--max-kl needs a KL divergence: protocol tokens, and not --kl off")
        protocol, scorer = self.scoring.protocol, self.scoring.scorer.name
        if protocol != "tokens" and self.kl in ("lockstep", "top-k"):
            raise UsageError(
                f"--kl {self.kl} needs the protocol tokens; {protocol} gives only sums of documents"
            )
        if self.kl == "lockstep" and scorer != "hf":
            raise UsageError(
                "--kl lockstep runs both models in one process; use --kl top-k with --scorer "
                f"{scorer}"
            )
        if self.kl == "lockstep" and self.cache is not None:
            raise UsageError(
                "--kl lockstep runs both models side by side and cannot use --cache; leave one out"
            )
