# SPDX-License-Identifier: Apache-2.0
"""QC705: the numbers are not comparable."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC705",
    "the scores are not comparable",
    severity="error",
    depth="eval",
    unit="settings",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("EleutherAI/lm-evaluation-harness#2467", "EleutherAI/lm-evaluation-harness#1586"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Candidate, base and accepted run are scored under one protocol: corpus, window, BOS,
    tokenizer, dtype, activations.

    Another protocol is refused, an error. Another environment (versions, device, attention, batch)
    is a warning: the intervals are widened by the noise floor.
    **Why.** One model's perplexity is 10.2 with one window and another with the next; with a BOS it
    went from 1.8e7 to 39.
    **Hurts.** A loss, or a gain, that is the harness's.
    **Mend.** Score the other one again, as the message names it.
    """
    found = ctx.inputs.evaluation
    if found is None or (found.failure and not found.incomparable):
        ctx.tally.miss(1, found.failure if found else "nothing was scored")
        return
    ctx.tally.see(max(1, found.keys))
    if found.incomparable:
        yield ctx.finding(
            "scored under unlike protocols", observed=found.incomparable, expected="one protocol"
        )
    elif found.unlike:
        yield ctx.finding(
            "scored in unlike environments; intervals are widened by the noise floor",
            severity="warning",
            observed="; ".join(found.unlike),
            expected="one environment",
            count=len(found.unlike),
        )
