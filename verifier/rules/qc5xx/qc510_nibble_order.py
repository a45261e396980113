# SPDX-License-Identifier: Apache-2.0
"""QC510: the two codes of each byte are in the wrong order."""

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

    **Why.** A packer of another convention.
    **Hurts.** Every pair of columns is exchanged: correlation with the right weight is about zero,
    output is noise.
    **Mend.** Swap the nibbles of the whole tensor. Only a base tells: the codes of both orders look
    alike.
    """
    for weight, _, r in compared(
        ctx, (m for m, found in ctx.candidate.formatted if m.weight is not None and found.packed)
    ):
        if r.cause == "nibbles":
            yield ctx.finding(
                "the base's values with the two codes of each byte exchanged",
                tensor=weight.name,
                observed=f"relative error {r.relative:.3f}",
                expected=f"about {r.by_max:.3f}, as with the nibbles swapped",
            )
