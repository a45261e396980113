# SPDX-License-Identifier: Apache-2.0
"""QC107: header size is near a reader's limit."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import MAX_HEADER
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

NEAR = 90_000_000
HUB_CLIENT = 25_000_000  # huggingface_hub 2.4: constants.SAFETENSORS_MAX_HEADER_LENGTH
# Older Hub clients request bytes 0 to 100,000 and accept a header of up to 100,000 bytes, although
# the response contains only 8 bytes of length and 99,993 of header.
TRUNCATED = range(99_994, 100_001)


@rule(
    "QC107",
    "header size is near a reader's limit",
    severity="warning",
    depth="header",
    unit="shards",
    repairable=True,
    consumers=("huggingface_hub", "transformers", "vLLM"),
    sources=("huggingface/huggingface_hub#4602", "safetensors/safetensors#668"),
    engines={
        "vllm": (
            "info",
            "reads local files through safetensors, whose limit is 100,000,000 bytes",
        ),
        "transformers": (
            "info",
            "reads local files through safetensors, whose limit is 100,000,000 bytes",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A shard header is well below 100,000,000 bytes and has a length that the Hub client can read.

    **What it does.** Compares each header length with the limits of safetensors (100,000,000 bytes)
    and of the Hub client (25,000,000). It also reports a length of 99,994 to 100,000 bytes, which
    older Hub clients truncate. A header beyond the limit of safetensors cannot be read (reported as
    QC104).

    **Why it happens.** Many small expert tensors in one shard, or a header length that happens to
    fall between 99,994 and 100,000.

    **Impact.** safetensors refuses a header of more than 100,000,000 bytes, the Hub client one of
    more than 25,000,000. Older Hub clients fail on a header that they truncate, as with
    nvidia/GLM-5-NVFP4.

    **Fix.** Write smaller shards. For a length of 99,994 to 100,000 bytes, pad the header with
    spaces or move one tensor to a different shard.
    """
    for shard in ctx.checkpoint.shards:
        if not shard.header:
            continue  # QC104: the header could not be read
        ctx.tally.see()
        message, allowed = _reader_limit(shard.header)
        if message:
            yield ctx.finding(
                message,
                where=Where(None, shard.file),
                observed=f"{shard.header:,} bytes",
                expected=allowed,
            )


def _reader_limit(length: int) -> tuple[str, str]:
    """Return what is wrong with a header of this length and which lengths are allowed, or ''s."""
    if length > NEAR:
        return "the header is close to the limit of safetensors", f"well below {MAX_HEADER:,} bytes"
    if length > HUB_CLIENT:
        return "the Hub client refuses a header of this length", f"at most {HUB_CLIENT:,} bytes"
    if length in TRUNCATED:
        allowed = f"below {TRUNCATED.start:,} or above {TRUNCATED.stop - 1:,} bytes"
        return "older Hub clients truncate a header of this length", allowed
    return "", ""
