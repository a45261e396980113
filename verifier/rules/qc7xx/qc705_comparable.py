# SPDX-License-Identifier: Apache-2.0
"""QC705: scores are not comparable."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import GateResult, NotScored, why_unscored
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC705",
    "scores are not comparable",
    severity="error",
    depth="eval",
    unit="settings",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("EleutherAI/lm-evaluation-harness#2467", "EleutherAI/lm-evaluation-harness#1586"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Candidate, base and accepted run are scored under the same protocol.

    **What it does.** Compares the settings of all runs. A different protocol (corpus, context
    length, BOS, tokenizer, dtype, activations) is an error. A different environment (versions,
    device, attention, batch) is a warning, and the intervals are widened by the noise floor.

    **Why it happens.** The perplexity of a model depends on these settings: 10.2 with one context
    length and something else with the next; with a BOS token it went from 1.8e7 to 39.

    **Impact.** A loss, or a gain, that comes from the harness.

    **Fix.** Score the run that the message names again.
    """
    result = ctx.inputs.evaluation
    if isinstance(result, NotScored) and result.incomparable:
        ctx.tally.see()
        yield ctx.finding(
            "scored with different protocols", observed=result.reason, expected="one protocol"
        )
        return
    if not isinstance(result, GateResult):
        ctx.tally.miss(1, why_unscored(result))
        return
    ctx.tally.see(max(1, len(result.key) + len(result.environment)))
    if result.unlike:
        yield ctx.finding(
            "scored in different environments; intervals are widened by the noise floor",
            severity="warning",
            observed="; ".join(result.unlike),
            expected="one environment",
            count=len(result.unlike),
        )
