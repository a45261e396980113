# SPDX-License-Identifier: Apache-2.0
"""QC106: index total_size is wrong."""

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
    repairable=True,
    consumers=("transformers",),
    sources=("ml-explore/mlx-examples#413",),
    engines={
        "vllm": ("info", "does not read it"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``metadata.total_size`` of the index is the sum of all tensor bytes.

    **What it does.** Compares ``total_size`` with the sizes in the shard headers. A missing field
    is not an error.

    **Why it happens.** File sizes were summed, headers included, or the number was copied from the
    source model.

    **Impact.** No loader refuses it; download estimates and memory planners rely on it.

    **Fix.** Set it to the sum of the tensors' bytes.
    """
    ckpt = ctx.checkpoint
    if ckpt.index is None or ckpt.index.total_size is None or any(s.problems for s in ckpt.shards):
        return
    ctx.tally.see()
    excess = ckpt.index.total_size - ckpt.nbytes
    if excess:
        yield ctx.finding(
            f"total_size differs from the size of all tensors by {excess:+,} bytes",
            where=Where(None, INDEX),
            observed=f"{ckpt.index.total_size:,}",
            expected=f"{ckpt.nbytes:,}",
        )
