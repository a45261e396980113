# SPDX-License-Identifier: Apache-2.0
"""QC704: base is broken (non-finite logits or uniform predictions)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from verifier.evaluation import GateResult, why_unscored
from verifier.findings import Finding
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC704",
    "base is broken (non-finite logits or uniform predictions)",
    severity="warning",
    depth="eval",
    unit="references",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("kekzl/imp#1273",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The base's logits are finite, and it predicts the corpus better than a uniform guess does.

    **What it does.** Compares the base's own loss with the logarithm of its vocabulary size. Base
    and candidate are dequantized and run through the same code, so they differ only in the
    checkpoint, and a broken base makes every candidate look good.

    **Why it happens.** The base is of the wrong revision, or a loader reads its norms in a
    different convention: NVFP4 was once blamed for a perplexity of 65 that became 7.5 after such a
    fix.

    **Impact.** A passing gate proves nothing.

    **Fix.** Compare with the release that the candidate was made from, on text that the model was
    made for.
    """
    result = ctx.inputs.evaluation
    if not isinstance(result, GateResult):
        ctx.tally.miss(1, why_unscored(result))
        return
    ctx.tally.see()
    if result.nonfinite_base:
        count = len(result.nonfinite_base)
        yield ctx.finding(
            "the base's logits are not finite",
            severity="error",
            count=count,
            observed=counted(count, "document"),
            expected="finite logits",
        )
    vocabulary = config_value(ctx.base.checkpoint.config if ctx.base else None, "vocab_size")
    loss = result.base_nats
    if loss is None or vocabulary is None or vocabulary < 2:
        return
    uniform = math.log(vocabulary)
    if loss >= uniform:
        yield ctx.finding(
            "the base predicts this text no better than a uniform guess",
            observed=f"{loss:.4f} nats/token",
            expected=f"below {uniform:.4f}, the logarithm of its {vocabulary:,} tokens",
        )
