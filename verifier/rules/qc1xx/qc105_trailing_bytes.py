# SPDX-License-Identifier: Apache-2.0
"""QC105: trailing bytes after the last tensor."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC105",
    "trailing bytes after the last tensor",
    severity="warning",
    depth="header",
    unit="shards",
    repairable=True,
    consumers=("transformers",),
    sources=("Comfy-Org/ComfyUI#15602",),
    engines={"vllm": ("error", "stops: safetensors 0.8 refuses the file (run on a CPU)")},
)
def check(ctx: Context) -> Iterator[Finding]:
    """A shard ends where its last tensor ends.

    **What it does.** Compares the file size of each shard with the end of its last tensor.

    **Why it happens.** A writer padded the file, or a longer file was overwritten in place.

    **Impact.** Newer releases of safetensors refuse such a file; older ones read it.

    **Fix.** Write the shard again.
    """
    for shard in ctx.checkpoint.shards:
        ctx.tally.see()
        for problem in shard.problems:
            if problem.kind == "trailing":
                yield ctx.finding(
                    f"{shard.file}: {problem.message}",
                    where=Where(None, shard.file),
                    observed=problem.observed,
                    expected=problem.expected,
                )
