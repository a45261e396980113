# SPDX-License-Identifier: Apache-2.0
"""QC702: loss increase exceeds its margin."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import GateResult, Loss, why_unscored
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC702",
    "loss increase exceeds its margin",
    severity="error",
    depth="eval",
    unit="margins",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1719",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The loss increase over the base, the KL divergence and the drift are within their margins.

    **What it does.** Compares one-sided bounds, clustered by document, with the margins: 95% for a
    loss, 99% for a KL divergence. Drift is decided by the ratio of the candidate's and the accepted
    run's KL divergences from the base, where both have top tokens, else by the loss. If the
    interval contains the margin, or a result is not plausible (a candidate that is far better than
    its base, scores that are constant), nothing is decided: the rule has then examined none of its
    margins, and the verdict is inconclusive.

    **Why it happens.** Some loss is expected: 6.6% of perplexity for MiniMax-M3 with its experts in
    NVFP4. More is a defect, or a recipe that does not suit the model. A dead expert is invisible in
    the absolute margin, but not in the drift against an accepted run.

    **Impact.** Answers get worse by less than a handful of prompts would show.

    **Fix.** If it is inconclusive, add documents. If it fails, use ``--drift-against`` and
    ``ckptgate diff`` with an accepted export.
    """
    result = ctx.inputs.evaluation
    if not isinstance(result, GateResult) or not result.losses:
        ctx.tally.miss(1, why_unscored(result) or "logits are not finite")
        return
    losses = result.losses
    yield from _measurements(ctx, result)
    beyond = [loss for loss in losses if loss.status == "beyond"]
    if beyond or result.outcome == "passed":
        ctx.tally.see(len(losses))
    else:
        ctx.tally.miss(len(losses), _why_inconclusive(result))
    for loss in beyond:
        if loss is losses[0] and loss.interval.low > result.collapse:
            continue  # QC701
        yield ctx.finding(
            f"{loss.title} exceeds its margin",
            observed=_estimate(loss, result.unit),
            expected=f"at most {loss.margin.nats:.5f} ({loss.margin.source})",
        )


def _measurements(ctx: Context, result: GateResult) -> Iterator[Finding]:
    """Yield what was measured, for information."""
    for loss in result.losses:
        yield ctx.finding(
            f"measured {loss.title} ({_unit(loss, result.unit)})",
            severity="info",
            observed=_estimate(loss, result.unit),
            expected=f"at most {loss.margin.nats:.5f} ({loss.margin.source})",
        )
    for note in result.notes:
        yield ctx.finding(f"note: {note}", severity="info")


def _why_inconclusive(result: GateResult) -> str:
    """Return the first loss that is neither within nor beyond its margin, and what would decide."""
    if result.doubts:
        return f"inconclusive: {'; '.join(result.doubts)}"
    loss = next(loss for loss in result.losses if loss.status == "open")
    about = f"about {result.needed:,}" if result.needed else "more"
    return (
        f"inconclusive: {loss.title} {_estimate(loss, result.unit)}, margin "
        f"{loss.margin.nats:.5f}; {about} documents like these would decide"
    )


def _unit(loss: Loss, unit: str) -> str:
    """Return the unit of what was measured, where ``unit`` is that of a loss."""
    units = {"KL": "nats per token", "KL ratio": "logarithm of the ratio"}
    return units.get(loss.measure, unit)


def _estimate(loss: Loss, unit: str) -> str:
    interval = loss.interval
    return f"{interval.delta:+.5f} {_unit(loss, unit)} [{interval.low:+.5f}, {interval.high:+.5f}]"
