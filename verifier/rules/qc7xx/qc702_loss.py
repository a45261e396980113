# SPDX-License-Identifier: Apache-2.0
"""QC702: loss increase exceeds its margin."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import Evaluation, Loss
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
    """The loss increase over the base, and over an accepted run if given, is within its margin.

    **What it does.** Compares one-sided 95% bounds, clustered by document, with the margin. If the
    interval contains the margin, nothing is decided: the rule has then examined none of its
    margins, and the verdict is inconclusive.

    **Why it happens.** Some loss is expected: 6.6% of perplexity for MiniMax-M3 with its experts in
    NVFP4. More is a defect, or a recipe that does not suit the model. A dead expert is invisible in
    the absolute margin, but not in the drift against an accepted run.

    **Impact.** Answers get worse by less than a handful of prompts would show.

    **Fix.** If it is inconclusive, add documents. If it fails, use ``--drift-against`` and
    ``ckptgate diff`` with an accepted export.
    """
    evaluation = ctx.inputs.evaluation
    if evaluation is None:
        ctx.tally.miss(1, "nothing was scored")
        return
    losses = evaluation.losses
    if evaluation.unscored or not losses:
        ctx.tally.miss(1, evaluation.unscored or "logits are not finite")
        return
    yield from _measurements(ctx, evaluation)
    beyond = [x for x in losses if x.standing == "beyond"]
    if beyond or all(x.standing == "within" for x in losses):
        ctx.tally.see(len(losses))
    else:
        ctx.tally.miss(len(losses), _why_inconclusive(evaluation))
    for loss in beyond:
        if loss is losses[0] and loss.low > evaluation.collapse:
            continue  # QC701
        yield ctx.finding(
            f"loss increase over {loss.against} exceeds its margin",
            observed=_estimate(loss, evaluation.unit),
            expected=f"at most {loss.margin:.5f} ({loss.source})",
        )


def _measurements(ctx: Context, evaluation: Evaluation) -> Iterator[Finding]:
    """Yield what was measured, for information."""
    for loss in evaluation.losses:
        yield ctx.finding(
            f"measured loss increase over {loss.against} ({evaluation.unit})",
            severity="info",
            observed=_estimate(loss, evaluation.unit),
            expected=f"at most {loss.margin:.5f} ({loss.source})",
        )
    for note in evaluation.notes:
        yield ctx.finding(f"note: {note}", severity="info")


def _why_inconclusive(evaluation: Evaluation) -> str:
    """Return the first loss that is neither within nor beyond its margin, and what would decide."""
    loss = next(x for x in evaluation.losses if x.standing == "open")
    about = f"about {evaluation.needed:,}" if evaluation.needed else "more"
    return (
        f"inconclusive: loss increase over {loss.against} {_estimate(loss, evaluation.unit)},"
        f" margin {loss.margin:.5f}; {about} documents like these would decide"
    )


def _estimate(loss: Loss, unit: str) -> str:
    return f"{loss.value:+.5f} {unit} [{loss.low:+.5f}, {loss.high:+.5f}]"
