# SPDX-License-Identifier: Apache-2.0
"""QC103: tensors outside the index, or the same name twice."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC103",
    "tensor outside the index, or twice",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "transformers"),
    sources=("vllm-project/vllm#54230", "Blaizzy/mlx-vlm#1464", "JustVugg/colibri#1479"),
    engines={
        "vllm": ("error", "reads every tensor of the files it selects, and the last one wins"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each tensor name occurs once over all safetensors files of the folder, and the index lists
    it.

    **Why.** Shards of an older export were left in the folder, or overlay files repeat names.
    **Hurts.** vLLM reads every tensor of the files it selects and the last one wins: wrong weights,
    silently; readers that follow the index never see what it does not list.
    **Mend.** Remove the stray files, then write the index again from the headers.
    """
    ckpt = ctx.checkpoint
    ctx.tally.see(len(ckpt.tensors))
    for name, files in ckpt.duplicates.items():
        yield ctx.finding(
            f"the same name stands in {len(files)} files: {', '.join(files[:3])}",
            where=Where(name, files[-1]),
            observed=f"{len(files)} copies",
            expected="1",
        )
    index = ckpt.index
    if index is None or not index.weight_map:
        return
    named = set(index.weight_map.values())
    for shard in ckpt.shards:
        loose = [n for n in shard.tensors if n not in index.weight_map]
        if loose:
            kind = (
                "lists some of its tensors only"
                if shard.file in named
                else "does not name the file at all"
            )
            yield ctx.finding(
                f"{shard.file} holds {len(loose)} tensors that the index does not list (it {kind})",
                where=Where(loose[0], shard.file),
                count=len(loose),
            )
