# SPDX-License-Identifier: Apache-2.0
"""QC104: shard is truncated or malformed."""

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
    """Each shard is intact: its header parses, and its byte ranges fill the file without overlap.

    **What it does.** Parses every shard header and checks that the tensors' byte ranges have no
    gaps, do not overlap and end within the file. Links that lead out of the directory are reported
    here and never followed. Bytes after the last tensor are reported by QC105.

    **Why it happens.** An interrupted write or upload, a file of zeros, or a header that states
    wrong sizes.

    **Impact.** safetensors refuses the file; readers that map it themselves read zeros and
    sometimes produce garbage tokens.

    **Fix.** Copy the shard again and compare its digest with the exporter's.
    """
    for shard in ctx.checkpoint.shards:
        ctx.tally.see()
        for problem in shard.problems:
            if problem.kind == "trailing":
                continue
            yield ctx.finding(
                f"{shard.file}: {problem.message}",
                cause=problem.kind,
                where=Where(problem.tensor, shard.file),
                observed=problem.observed,
                expected=problem.expected,
            )
    for problem in ctx.checkpoint.problems:
        if problem.kind == "link":
            ctx.tally.see()
            yield ctx.finding(
                f"{problem.file}: {problem.message}",
                cause=problem.kind,
                where=Where(None, problem.file),
            )
