# SPDX-License-Identifier: Apache-2.0
"""QC704: the reference is no reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

from verifier.findings import Finding
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC704",
    "the base cannot serve as the reference",
    severity="warning",
    depth="eval",
    unit="references",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("kekzl/imp#1273",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The base is finite, and predicts the corpus better than a uniform guess over its vocabulary
    does.

    Base and candidate are decoded and run on one path, so that what they differ in is the
    checkpoint. A base that is broken itself makes every candidate look sound.
    **Why.** A base of the wrong revision, or one whose norms a loader reads in another convention:
    NVFP4 was blamed for a perplexity of 65 that was 7.5 after such a mend.
    **Hurts.** A pass proves nothing.
    **Mend.** Judge against the release that the candidate was made of; text that the model was made
    for.
    """
    found = ctx.inputs.evaluation
    if found is None or found.unscored:
        ctx.tally.miss(1, found.unscored if found else "nothing was scored")
        return
    ctx.tally.see()
    if found.nonfinite_base:
        yield ctx.finding(
            "the reference's own logits are not finite",
            severity="error",
            count=len(found.nonfinite_base),
            observed=f"{len(found.nonfinite_base)} documents",
            expected="finite logits",
        )
    config = ctx.base.checkpoint.config if ctx.base else None
    words = config_value(config, "vocab_size")
    if (
        found.base_nats is not None
        and words is not None
        and words > 1
        and found.base_nats >= math.log(words)
    ):
        yield ctx.finding(
            "the base predicts this text no better than a uniform guess",
            observed=f"{found.base_nats:.4f} nats a token",
            expected=f"below {math.log(words):.4f}, the logarithm of its {words:,} tokens",
        )
