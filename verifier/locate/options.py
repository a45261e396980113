# SPDX-License-Identifier: Apache-2.0
"""What a search for damage is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from verifier.gate.corpora import Corpus
from verifier.gate.jobs import Scorer
from verifier.gate.options import SEQ_LEN, ScoringOptions
from verifier.progress import Progress

BATCH = 4
"""Windows at a time: parts of the search use some batches only, so small ones divide the work
better."""
LIMIT = 3.0
"""The most that a search may cost, in gates."""


@dataclass(frozen=True)
class LocateOptions:
    """How damage is searched for.

    Args:
        corpus: the documents.
        seq_len: tokens in a window.
        batch: windows at a time.
        device: where the models run.
        activations: ``bf16``, ``declared`` or ``shared``, as in the gate.
        drift_against: file of an accepted run; its divergence is the reference in place of the
            format's norm.
        max_ratio: the largest tolerated ratio of KL divergences, ``1.15x``.
        scratch: directory for hidden states; in memory by default.
        progress: called with (done, total) layer passes.
    """

    corpus: Corpus
    seq_len: int = SEQ_LEN
    batch: int = BATCH
    device: str = "cpu"
    activations: str = "bf16"
    drift_against: str | os.PathLike[str] | None = None
    max_ratio: str | None = None
    scratch: Path | None = None
    progress: Progress | None = field(default=None, compare=False)

    def scoring(self, top_k: int) -> ScoringOptions:
        """Return how the gate would score the same text."""
        return ScoringOptions(
            self.corpus,
            seq_len=self.seq_len,
            batch=self.batch,
            device=self.device,
            workers=1,
            top_k=top_k,
            scorer=Scorer(activations=self.activations),  # type: ignore[arg-type]
        )
