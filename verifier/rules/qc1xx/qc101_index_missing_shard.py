# SPDX-License-Identifier: Apache-2.0
"""QC101: index names a missing shard."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC101",
    "index names a missing shard",
    severity="error",
    depth="header",
    unit="shards",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("Neph0s/CoSER#3",),
    engines={
        "vllm": ("error", "stops with FileNotFoundError"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every shard that model.safetensors.index.json names exists in the checkpoint directory.

    **What it does.** Looks up every file that the index names. It also reports an index that is not
    a JSON object, an index entry that is a path instead of a file name (absolute, or with ``..``;
    such a path is never followed) or not a safetensors file, and, as a warning, several shards
    without an index.

    **Why it happens.** A merge or upload lost shards, or the index belongs to a different export.

    **Impact.** vLLM stops with FileNotFoundError; readers that tolerate the gap load only part of
    the model.

    **Fix.** Upload the missing files, or rebuild the index from the shard headers.
    """
    ckpt = ctx.checkpoint
    index = ckpt.index
    if index is None:
        if len(ckpt.shards) > 1:
            ctx.tally.see(len(ckpt.shards))
            yield ctx.finding(
                f"{len(ckpt.shards)} shards but no model.safetensors.index.json",
                cause="no index",
                severity="warning",
                engines={"transformers": ("error", "does not find the shards without an index")},
            )
        return
    for problem in index.problems:
        ctx.tally.see()
        yield ctx.finding(
            f"{problem.file}: {problem.message}",
            cause=problem.kind,
            where=Where(problem.tensor, problem.file),
        )
    for file, names in sorted(index.names_by_file.items()):
        ctx.tally.see()
        if file not in ckpt.files:
            yield ctx.finding(
                f"the index names {file}, which does not exist:"
                f" {counted(len(names), 'tensor')} cannot be loaded",
                cause=f"missing shard {file}",
                where=Where(names[0], file),
                observed="absent",
                expected="present",
            )
        elif not file.endswith(".safetensors"):
            yield ctx.finding(
                f"the index names {file}, which is not a safetensors file",
                cause=f"not a shard {file}",
                where=Where(names[0], file),
                observed=file,
                expected="*.safetensors",
            )
