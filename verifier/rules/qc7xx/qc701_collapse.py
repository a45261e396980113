# SPDX-License-Identifier: Apache-2.0
"""QC701: model output collapsed."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import GateResult, why_unscored
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC701",
    "model output collapsed",
    severity="error",
    depth="eval",
    unit="losses",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#36094", "kekzl/imp#2044"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The perplexity is not significantly more than twice the base's on the same text.

    **What it does.** Compares the confidence interval of the loss increase with that of a collapse.
    For a task: half of the correct answers lost.

    **Why it happens.** A wrong scale, a swapped projection, or a layer loaded into a different one:
    a loss of this size is not rounding.

    **Impact.** The model produces garbage; accuracies of 0.90 became 0.11.

    **Fix.** Find the tensor with ``check --depth payload --base``; QC5xx names it.
    """
    result = ctx.inputs.evaluation
    if not isinstance(result, GateResult) or not result.losses:
        ctx.tally.miss(1, why_unscored(result) or "logits are not finite")
        return
    loss, collapse = result.losses[0].interval, result.collapse
    interval = f"[{loss.low:+.5f}, {loss.high:+.5f}]"
    if loss.low > collapse:
        ctx.tally.see()
        yield ctx.finding(
            "the loss increase over the base is that of a collapsed model",
            observed=f"{loss.delta:+.5f} {result.unit} {interval}",
            expected=f"at most {collapse:.5f}",
        )
    elif loss.high <= collapse:
        ctx.tally.see()
    else:
        ctx.tally.miss(
            1, f"inconclusive: {interval} contains the collapse threshold {collapse:.5f}"
        )
