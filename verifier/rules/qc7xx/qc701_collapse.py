# SPDX-License-Identifier: Apache-2.0
"""QC701: the model is destroyed."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC701",
    "the model collapsed",
    severity="error",
    depth="eval",
    unit="losses",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#36094", "kekzl/imp#2044"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """On the same text the perplexity is not shown to be more than twice the base's (a task: half
    its correct answers lost).

    **Why.** A wrong scale, a swapped projection, a layer that was loaded into another: a loss of
    this size is no rounding.
    **Hurts.** The model answers nonsense; accuracies of 0.90 became 0.11.
    **Mend.** Find the tensor with ``check --depth payload --base``; QC5xx name it.
    """
    found = ctx.inputs.evaluation
    if found is None or found.unscored or not found.losses:
        ctx.tally.miss(
            1, "nothing was scored" if found is None else found.unscored or "logits are not finite"
        )
        return
    loss = found.losses[0]
    if loss.low > found.collapse:
        ctx.tally.see()
        yield ctx.finding(
            "the loss over the base is that of a destroyed model",
            observed=f"{loss.value:+.5f} {found.unit} [{loss.low:+.5f}, {loss.high:+.5f}]",
            expected=f"at most {found.collapse:.5f}",
        )
    elif loss.high <= found.collapse:
        ctx.tally.see()
    else:
        ctx.tally.miss(
            1,
            f"inconclusive: [{loss.low:+.5f}, {loss.high:+.5f}] holds a collapse's {found.collapse:.5f}",
        )
