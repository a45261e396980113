# SPDX-License-Identifier: Apache-2.0
"""QC104: a shard is cut off or no safetensors."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC104",
    "shard is truncated or malformed",
    severity="error",
    depth="header",
    unit="shards",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("osaurus-ai/vmlx-swift#217", "PersuGPT/PersuGPT.github.io#2"),
    engines={
        "vllm": ("error", "stops with SafetensorError"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each shard is whole: a header that parses, byte ranges without gap or overlap, and all of
    them within the file.

    **Why.** An interrupted write or upload; a file of zeros; a header that lies about sizes.
    **Hurts.** safetensors refuses it; readers that map the file themselves read zeros and answer
    token soup at times.
    **Mend.** Copy the shard again and compare digests with the exporter's.
    """
    for shard in ctx.checkpoint.shards:
        ctx.tally.see()
        for problem in shard.problems:
            if problem.kind == "trailing":
                continue
            yield ctx.finding(
                f"{shard.file}: {problem.message}",
                where=Where(problem.tensor, shard.file),
                observed=problem.observed,
                expected=problem.expected,
            )
    for problem in ctx.checkpoint.problems:
        if problem.kind == "link":
            ctx.tally.see()
            yield ctx.finding(f"{problem.file}: {problem.message}", where=Where(None, problem.file))
