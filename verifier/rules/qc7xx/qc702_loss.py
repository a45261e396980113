# SPDX-License-Identifier: Apache-2.0
"""QC702: the loss is beyond its margin."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import Evaluation, Loss
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC702",
    "the loss is beyond its margin",
    severity="error",
    depth="eval",
    unit="margins",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1719",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The loss over the base, and over an accepted run where one is given, is shown to be within
    its margin.

    One-sided 95 % bounds clustered by document decide. Where a bound holds the margin nothing is
    shown: the rule has then examined none of its margins, and the verdict is inconclusive.
    **Why.** Some loss is expected: 6.6 % of perplexity for MiniMax-M3 with its experts in NVFP4.
    More is a defect, or a recipe that does not suit the model. A dead expert hides in the absolute
    margin and not in the drift against an accepted run.
    **Hurts.** Answers get worse by less than a handful of prompts would show.
    **Mend.** More documents where it is open; ``--drift-against`` and ``ckptgate diff`` with an
    accepted export where not.
    """
    found = ctx.inputs.evaluation
    if found is None or found.unscored or not found.losses:
        ctx.tally.miss(
            1, "nothing was scored" if found is None else found.unscored or "logits are not finite"
        )
        return
    yield from _measured(ctx, found)
    count = len(found.losses)
    beyond = [x for x in found.losses if x.standing == "beyond"]
    if beyond or all(x.standing == "within" for x in found.losses):
        ctx.tally.see(count)
    else:
        about = f"about {found.needed:,}" if found.needed else "more"
        ctx.tally.miss(count, f"{_open(found)}; {about} documents like these would decide")
    for loss in beyond:
        if loss is found.losses[0] and loss.low > found.collapse:
            continue  # QC701
        yield ctx.finding(
            f"the loss over {loss.against} is shown to be beyond its margin",
            observed=_shown(loss, found.unit),
            expected=f"at most {loss.margin:.5f} ({loss.source})",
        )


def _measured(ctx: Context, found: Evaluation) -> Iterator[Finding]:
    for loss in found.losses:
        yield ctx.finding(
            f"measured: the loss over {loss.against}, in {found.unit}",
            severity="info",
            observed=_shown(loss, found.unit),
            expected=f"at most {loss.margin:.5f} ({loss.source})",
        )
    for note in found.notes:
        yield ctx.finding(f"measured: {note}", severity="info")


def _open(found: Evaluation) -> str:
    first = next(x for x in found.losses if x.standing == "open")
    return f"inconclusive: the loss over {first.against}, {_shown(first, found.unit)}, margin {first.margin:.5f}"


def _shown(loss: Loss, unit: str) -> str:
    return f"{loss.value:+.5f} {unit} [{loss.low:+.5f}, {loss.high:+.5f}]"
