# SPDX-License-Identifier: Apache-2.0
"""QC510: nibbles are swapped."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC510",
    "nibbles are swapped",
    severity="error",
    depth="payload",
    split=True,
    unit="packed weights",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("sgl-project/sglang#23625", "Comfy-Org/comfy-kitchen#41"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A packed byte holds the even column in its low four bits and the odd one in its high four.

    **What it does.** Compares the dequantized weight with the base, as stored and with swapped
    nibbles. Without a base the two orders cannot be told apart.

    **Why it happens.** The packer uses a different convention.

    **Impact.** Every pair of columns is swapped: the correlation with the right weight is about
    zero, and the output is noise.

    **Fix.** Swap the nibbles of the whole tensor.
    """
    formatted = ctx.candidate.formatted
    packed = (m for m, fmt in formatted if m.weight is not None and fmt.packed)
    for weight, _, result in compared(ctx, packed):
        if result.cause == "nibbles":
            yield ctx.finding(
                "the weight matches the base once the nibbles of each byte are swapped",
                tensor=weight.name,
                observed=f"relative error {result.relative:.3f}",
                expected=f"about {result.by_max:.3f}, as with swapped nibbles",
            )
