# SPDX-License-Identifier: Apache-2.0
"""QC101: the index names a shard that is not there."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


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
    """Every shard that model.safetensors.index.json names must be a file of the folder.

    **Why.** A merge or upload lost shards, or the index is that of another export. An index that is
    no JSON object, or that names a path instead of a file (absolute, with ``..``), counts here too:
    it is never followed.
    **Hurts.** vLLM stops with FileNotFoundError; readers that tolerate it load part of the model.
    **Mend.** Upload the missing files, or write the index again from the shards' headers.
    """
    ckpt = ctx.checkpoint
    index = ckpt.index
    if index is None:
        if len(ckpt.shards) > 1:
            ctx.tally.see(len(ckpt.shards))
            yield ctx.finding(
                f"{len(ckpt.shards)} shards and no model.safetensors.index.json: transformers does not find them",
                severity="warning",
                engines={"transformers": ("error", "does not find the shards")},
            )
        return
    for problem in index.problems:
        ctx.tally.see()
        yield ctx.finding(
            f"{problem.file}: {problem.message}", where=Where(problem.tensor, problem.file)
        )
    wanted: dict[str, list[str]] = {}
    for name, file in index.weight_map.items():
        wanted.setdefault(file, []).append(name)
    for file, names in sorted(wanted.items()):
        ctx.tally.see()
        if file not in ckpt.files:
            yield ctx.finding(
                f"the index names {file}, which is not in the folder; {len(names)} tensors are lost",
                where=Where(names[0], file),
                observed="absent",
                expected="present",
            )
        elif not file.endswith(".safetensors"):
            yield ctx.finding(
                f"the index names {file} as a shard, which is no safetensors file",
                where=Where(names[0], file),
                observed=file,
                expected="*.safetensors",
            )
