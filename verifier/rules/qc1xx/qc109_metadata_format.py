# SPDX-License-Identifier: Apache-2.0
"""QC109: a shard's metadata names no format, or another than PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC109",
    "shard metadata names no format",
    severity="warning",
    depth="header",
    unit="shards",
    consumers=("transformers",),
    sources=("NVIDIA/Model-Optimizer#1422",),
    engines={
        "vllm": ("info", "reads tensors through safe_open and never asks for the metadata"),
        "sglang": ("info", "reads tensors through safe_open and never asks for the metadata"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``__metadata__`` of each shard states ``format: pt``.

    **Why.** A custom writer: ``save_file`` without metadata, another framework's, or metadata of
    its own in its place.
    **Hurts.** transformers 4 refuses a file whose metadata names another format or none ("make sure
    to save your model with the save_pretrained method"). Where there is no metadata at all only its
    older releases stumble, and this is a note. (A broken header is QC104.)
    **Mend.** Write the header again with ``{"format": "pt"}``; the tensors' bytes stay as they are.
    """
    said: dict[tuple[str, str, Severity], list[str]] = {}
    for shard in ctx.checkpoint.shards:
        if not shard.header or any(p.kind != "trailing" for p in shard.problems):
            continue  # QC104
        ctx.tally.see()
        found = shard.metadata.get("format")
        if found == "pt":
            continue
        if not shard.metadata:
            key: tuple[str, str, Severity] = ("the header has no __metadata__", "absent", "info")
        elif found is None:
            key = ("__metadata__ names no format", ", ".join(sorted(shard.metadata)[:8]), "warning")
        else:
            key = ("__metadata__ names another format than PyTorch's", found[:40], "warning")
        said.setdefault(key, []).append(shard.file)
    for (message, observed, severity), files in said.items():
        yield ctx.finding(
            message,
            where=Where(None, files[0]),
            observed=observed,
            expected="format: pt",
            severity=severity,
            count=len(files),
        )
