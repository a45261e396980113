# SPDX-License-Identifier: Apache-2.0
"""The gate as depth eval of a check: what it measures is what rules QC701 to QC705 read."""

from __future__ import annotations

from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, IncomparableError
from verifier.evaluation import Evaluate, Evaluation, NotScored
from verifier.gate.corpora import WIKITEXT
from verifier.gate.decision import BUDGETS
from verifier.gate.gate import run
from verifier.gate.score import formats_of


def evaluator(corpus: str | None = WIKITEXT, **options: Any) -> Evaluate:
    """Return what scores a candidate and its base for ``verifier.check(..., depth="eval",
    evaluate=...)``.

    What a checkpoint's contents do not allow becomes a `NotScored`; other errors are raised when it
    is called.

    Args:
        corpus: as `verifier.gate.run` takes it; None for a task.
        options: the other keywords of `verifier.gate.run`.
    """

    def evaluate(candidate: Checkpoint, base: Checkpoint) -> Evaluation:
        if options.get("max_increase") is None and not formats_of(candidate) & BUDGETS.keys():
            return NotScored(
                "no quantized format with a default budget; give a margin (--max-increase)"
            )
        try:
            return run(candidate.uri, base=base.uri, corpus=corpus, **options)
        except IncomparableError as error:
            return NotScored(str(error), incomparable=True)
        except ContentError as error:
            return NotScored(str(error))

    return evaluate
