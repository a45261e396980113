# SPDX-License-Identifier: Apache-2.0
"""QC106: the index states a wrong total_size."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import INDEX
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC106",
    "index total_size is wrong",
    severity="warning",
    depth="header",
    unit="indexes",
    consumers=("transformers",),
    sources=("ml-explore/mlx-examples#413",),
    engines={
        "vllm": ("info", "does not read it"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``metadata.total_size`` of the index is the sum of all tensor bytes; a missing one is not
    judged wrong.

    **Why.** File sizes were summed (headers included), or the number is the source model's.
    **Hurts.** No loader refuses it; download sizing and memory planners believe it.
    **Mend.** Write the sum of the tensors' bytes.
    """
    ckpt = ctx.checkpoint
    if ckpt.index is None or ckpt.index.total_size is None or any(s.problems for s in ckpt.shards):
        return
    ctx.tally.see()
    if ckpt.index.total_size != ckpt.nbytes:
        yield ctx.finding(
            f"total_size differs from the tensors' bytes by {ckpt.index.total_size - ckpt.nbytes:+,}",
            where=Where(None, INDEX),
            observed=f"{ckpt.index.total_size:,}",
            expected=f"{ckpt.nbytes:,}",
        )
