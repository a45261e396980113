# SPDX-License-Identifier: Apache-2.0
"""QC107: a header that some readers cannot take."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import MAX_HEADER
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

NEAR = 90_000_000
HUB_CLIENT = 25_000_000  # huggingface_hub 2.4: constants.SAFETENSORS_MAX_HEADER_LENGTH
# Older hub clients ask for bytes 0 to 100,000 and take a header of up to 100,000 bytes from the
# answer, which holds 8 bytes of length and 99,993 of header.
CUT = range(99_994, 100_001)


@rule(
    "QC107",
    "header is near a reader's limit",
    severity="warning",
    depth="header",
    unit="shards",
    consumers=("huggingface_hub", "transformers", "vLLM"),
    sources=("huggingface/huggingface_hub#4602", "safetensors/safetensors#668"),
    engines={
        "vllm": (
            "info",
            "reads local files through safetensors, whose cap is 100,000,000 bytes (safetensors#668)",
        ),
        "transformers": (
            "info",
            "reads local files through safetensors, whose cap is 100,000,000 bytes (safetensors#668)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A shard's header is well below 100,000,000 bytes, and of a length that the hub's own client
    reads.

    **Why.** Many small expert tensors in one shard; or the bad luck of a length from 99,994 to
    100,000.
    **Hurts.** safetensors refuses a header of more than 100,000,000 bytes (then QC104 speaks), the
    hub client one of more than 25,000,000; older hub clients cut one of 99,994 to 100,000 bytes
    short and fail, as with nvidia/GLM-5-NVFP4.
    **Mend.** Write smaller shards. For the third case pad the header with spaces, or move one
    tensor to another shard.
    """
    for shard in ctx.checkpoint.shards:
        if not shard.header:
            continue  # QC104: the header could not be read
        ctx.tally.see()
        said = _said(shard.header)
        if said:
            yield ctx.finding(
                said[0],
                where=Where(None, shard.file),
                observed=f"{shard.header:,} bytes",
                expected=said[1],
            )


def _said(length: int) -> tuple[str, str] | None:
    if length > NEAR:
        return (
            "the header is close to the cap of safetensors",
            f"at most {MAX_HEADER:,}, with room to grow",
        )
    if length > HUB_CLIENT:
        return "the hub client refuses a header of this length", f"at most {HUB_CLIENT:,}"
    if length in CUT:
        return (
            "older hub clients cut a header of this length short",
            f"below {CUT.start:,} or above {CUT.stop - 1:,}",
        )
    return None
