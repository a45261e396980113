# SPDX-License-Identifier: Apache-2.0
"""QC109: shard metadata does not state the format."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC109",
    "shard metadata does not state the format",
    severity="warning",
    depth="header",
    unit="shards",
    repairable=True,
    consumers=("transformers",),
    sources=("NVIDIA/Model-Optimizer#1422",),
    engines={
        "vllm": ("info", "reads tensors through safe_open and ignores the metadata"),
        "sglang": ("info", "reads tensors through safe_open and ignores the metadata"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``__metadata__`` of each shard states ``format: pt``.

    **What it does.** Reads ``__metadata__`` of every shard whose header parses (others are QC104).
    A header without any metadata is only a note.

    **Why it happens.** A custom writer: ``save_file`` without metadata, a different framework, or
    metadata that replaced the format.

    **Impact.** transformers 4 refuses a file whose metadata states a different format or none
    ("make sure to save your model with the save_pretrained method"). Without any metadata only its
    older releases fail.

    **Fix.** Rewrite the header with ``{"format": "pt"}``; the tensors' bytes do not change.
    """
    files_by_defect: dict[tuple[str, str, Severity], list[str]] = {}
    for shard in ctx.checkpoint.shards:
        if not shard.header or any(p.kind != "trailing" for p in shard.problems):
            continue  # QC104
        ctx.tally.see()
        stated = shard.metadata.get("format")
        if stated == "pt":
            continue
        if not shard.metadata:
            key: tuple[str, str, Severity] = ("the header has no __metadata__", "absent", "info")
        elif stated is None:
            key = (
                "__metadata__ does not state a format",
                ", ".join(sorted(shard.metadata)[:8]),
                "warning",
            )
        else:
            key = ("__metadata__ states a format other than PyTorch's", stated[:40], "warning")
        files_by_defect.setdefault(key, []).append(shard.file)
    for (message, observed, severity), files in files_by_defect.items():
        yield ctx.finding(
            message,
            where=Where(None, files[0]),
            observed=observed,
            expected="format: pt",
            severity=severity,
            count=len(files),
        )
