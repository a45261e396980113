# SPDX-License-Identifier: Apache-2.0
"""QC703: some texts fail."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule

SHOWN = 16
LAYERS = 64


@rule(
    "QC703",
    "some texts fail",
    severity="error",
    depth="eval",
    unit="documents and experts",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#45212", "tonyd2wild/GLM-5.3-Flash-NVFP4-DFlash2-2x-DGX-Spark#10"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """No document gives logits that are not finite, and none loses far more than the others do.

    A document beyond the bound is a warning: where documents differ in size or kind some are, by
    nature (docs/gate.md has the measured rate). Routed experts that no token reached are named as
    not examined: they are *not judged*.
    **Why.** A dead expert or a scale that overflows is met by some texts only: code and formulas, a
    language, a long prompt.
    **Hurts.** A short greeting works; other prompts give pad tokens or U+FFFD.
    **Mend.** QC301, QC501 and QC511 find the expert; a corpus of mixed domains reaches more of
    them.
    """
    found = ctx.inputs.evaluation
    if found is None or found.unscored:
        ctx.tally.miss(1, found.unscored if found else "nothing was scored")
        return
    unreached = [x for x in found.reach if x.unreached]
    ctx.tally.see(found.documents + sum(x.experts - len(x.unreached) for x in found.reach))
    names = "; ".join(f"{x.layer} {_first(x.unreached)}" for x in unreached[:LAYERS])
    ctx.tally.miss(
        sum(len(x.unreached) for x in unreached), f"no token of the corpus reaches experts {names}"
    )
    if found.nonfinite:
        yield ctx.finding(
            "logits are not finite",
            observed=f"documents {_first(found.nonfinite)} of {found.documents}",
            expected="finite logits",
            count=len(found.nonfinite),
        )
    if found.hit and found.worst is not None:
        yield ctx.finding(
            "documents lose more than the others allow: damage that some text meets and the mean hides",
            severity="warning",
            observed=f"documents {_first(found.hit)}; the worst, {found.worst[0]}, {found.worst[1]:+.5f} {found.unit}",
            expected=f"at most {found.worst[2]:+.5f} there",
            count=len(found.hit),
        )


def _first(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:SHOWN]))}{', …' if len(numbers) > SHOWN else ''}"
