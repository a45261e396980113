# SPDX-License-Identifier: Apache-2.0
"""QC103: tensor is duplicated or not in the index."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint.index import INDEX
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC103",
    "tensor is duplicated or not in the index",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "transformers"),
    sources=("vllm-project/vllm#54230", "Blaizzy/mlx-vlm#1464", "JustVugg/colibri#1479"),
    engines={
        "vllm": (
            "error",
            "reads every tensor of the files that the index names, in order; the last one wins, "
            "silently",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each tensor name occurs once across all safetensors files, and the index lists it.

    **What it does.** Compares the tensor names of all safetensors files in the directory with each
    other and with the index, where there is one.

    **Why it happens.** Shards of an older export were left in the directory, or overlay files
    repeat names.

    **Impact.** vLLM reads every tensor of the files that the index names, listed or not, and the
    last one of a name wins: wrong weights, silently. A file that the index omits it does not read;
    without an index it reads every file. Readers that follow the index never see a tensor that it
    does not list.

    **Fix.** Remove the stray files, then rebuild the index from the shard headers.
    """
    ckpt = ctx.checkpoint
    ctx.tally.see(len(ckpt.tensors))
    for name, files in ckpt.duplicates.items():
        yield ctx.finding(
            f"{len(files)} files contain this tensor name: {', '.join(files[:3])}",
            cause="duplicate",
            where=Where(name, files[-1]),
            observed=f"{len(files)} copies",
            expected="1",
        )
    index = ckpt.index
    if index is None:
        return
    if not index.weight_map:
        if not index.problems and ckpt.tensors:
            yield ctx.finding(
                "the index lists no tensor",
                cause="empty index",
                where=Where(None, INDEX),
                observed="0 tensors",
                expected=f"{len(ckpt.tensors):,}",
            )
        return
    for shard in ckpt.shards:
        unindexed = [n for n in shard.tensors if n not in index.weight_map]
        if unindexed:
            omitted = shard.file not in index.names_by_file
            scope = "omits it" if omitted else "lists only some of its tensors"
            yield ctx.finding(
                f"{counted(len(unindexed), 'tensor')} in {shard.file}"
                f" {'is' if len(unindexed) == 1 else 'are'} not in the index, which {scope}",
                cause="unindexed",
                where=Where(unindexed[0], shard.file),
                count=len(unindexed),
                engines={"vllm": ("warning", "does not read the file")} if omitted else None,
            )
