# SPDX-License-Identifier: Apache-2.0
"""QC703: non-finite logits, outlier documents or unreached experts."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.evaluation import GateResult, why_unscored
from verifier.findings import Finding
from verifier.rules.context import Context, Tally
from verifier.rules.registry import rule

MAX_NUMBERS = 16
MAX_LAYERS = 64


@rule(
    "QC703",
    "non-finite logits, outlier documents or unreached experts",
    severity="error",
    depth="eval",
    unit="documents and experts",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#45212", "tonyd2wild/GLM-5.3-Flash-NVFP4-DFlash2-2x-DGX-Spark#10"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """All logits are finite, and no document loses far more than the others.

    **What it does.** Looks at every document by itself. A document beyond the bound is a warning:
    documents that differ in size or kind exceed it naturally (docs/gate.md gives the measured
    rate). Routed experts that no token reached are counted as not examined.

    **Why it happens.** Only some texts reach a dead expert or an overflowing scale: code and
    formulas, one language, a long prompt.

    **Impact.** A short greeting works; other prompts produce pad tokens or U+FFFD.

    **Fix.** QC301, QC501 and QC511 find the expert; a corpus of mixed domains reaches more of them.
    """
    result = ctx.inputs.evaluation
    if not isinstance(result, GateResult):
        ctx.tally.miss(1, why_unscored(result))
        return
    _count(ctx.tally, result)
    nonfinite, outliers = result.nonfinite_candidate, result.measures.beyond
    if nonfinite:
        yield ctx.finding(
            "logits are not finite",
            observed=f"documents {_numbers(nonfinite)} of {len(result.documents)}",
            expected="finite logits",
            count=len(nonfinite),
        )
    if outliers and result.measures.worst is not None:
        document, loss, bound = result.measures.worst
        yield ctx.finding(
            "outlier documents: possible localized damage that the mean hides",
            severity="warning",
            observed=f"documents {_numbers(outliers)};"
            f" the worst, {document}, loses {loss:+.5f} {result.unit}",
            expected=f"at most {bound:+.5f} for that document",
            count=len(outliers),
        )


def _count(tally: Tally, result: GateResult) -> None:
    """Count documents and experts; experts that no token reached are missed."""
    layers = result.experts
    tally.see(len(result.documents) + sum(x.experts - len(x.unreached) for x in layers))
    partly = [x for x in layers if x.unreached]
    names = "; ".join(f"{x.layer} {_numbers(x.unreached)}" for x in partly[:MAX_LAYERS])
    missed = sum(len(x.unreached) for x in partly)
    tally.miss(missed, f"no token of the corpus reaches experts {names}")


def _numbers(numbers: tuple[int, ...]) -> str:
    return (
        f"{', '.join(map(str, numbers[:MAX_NUMBERS]))}{', …' if len(numbers) > MAX_NUMBERS else ''}"
    )
