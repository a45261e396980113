# SPDX-License-Identifier: Apache-2.0
"""QC109: a shard's metadata names no format, or another than PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC109", "shard metadata names no format", severity="warning", depth="header", unit="shards",
    consumers=("transformers",), sources=("NVIDIA/Model-Optimizer#1422",),
    engines={
        "vllm": ("info", "reads tensors through safe_open and never asks for the metadata"),
        "sglang": ("info", "reads tensors through safe_open and never asks for the metadata"),
    },
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """``__metadata__`` of each shard states ``format: pt``.

    **Why.** A custom writer: ``save_file`` without metadata, another framework's, or metadata of its own in its place.
    **Hurts.** transformers 4 refuses a file whose metadata names another format or none ("make sure to save your model
    with the save_pretrained method"). Where there is no metadata at all only its older releases stumble, and this is a
    note. (Metadata that is no object of strings is QC104.)
    **Mend.** Write the header again with ``{"format": "pt"}``; the tensors' bytes stay as they are.
    """
    for shard in ctx.checkpoint.shards:
        if any(p.kind == "metadata" for p in shard.problems) or not shard.header:
            continue
        ctx.tally.see()
        found = shard.metadata.get("format")
        if found == "pt":
            continue
        where = Where(None, shard.file)
        if not shard.metadata:
            yield ctx.finding(
                "the header has no __metadata__", where=where, observed="absent", expected="format: pt", severity="info"
            )
        elif found is None:
            yield ctx.finding(
                "__metadata__ names no format", where=where, observed=sorted(shard.metadata)[:8], expected="format: pt"
            )
        else:
            yield ctx.finding(
                "__metadata__ names another format than PyTorch's", where=where, observed=found[:40], expected="pt"
            )
