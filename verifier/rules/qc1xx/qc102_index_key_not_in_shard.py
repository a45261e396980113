# SPDX-License-Identifier: Apache-2.0
"""QC102: indexed tensor is not in its shard."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC102",
    "indexed tensor is not in its shard",
    severity="error",
    depth="header",
    unit="index entries",
    consumers=("transformers", "SGLang"),
    sources=("ByteDance-Seed/VeOmni#799",),
    engines={
        "vllm": ("warning", "reads only headers and does not notice the entry"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor name in the index is in the header of the shard that the index maps it to.

    **What it does.** Compares the index with the shard headers. Missing shards are reported by
    QC101, unreadable ones by QC104.

    **Why it happens.** The index was copied from the source model, or an exporter renamed tensors
    without updating the index.

    **Impact.** transformers raises, or leaves the parameter randomly initialized; vLLM reads only
    headers and does not notice.

    **Fix.** Rebuild the index from the shard headers.
    """
    ckpt = ctx.checkpoint
    if ckpt.index is None:
        return
    # QC101 and QC104 report the other shards.
    headers = {s.file: s.tensors for s in ckpt.shards if not s.problems}
    listed = {file: ckpt.index.names_by_file.get(file, ()) for file in headers}
    ctx.tally.see(sum(map(len, listed.values())))
    absent = {n for file, names in listed.items() for n in names if n not in headers[file]}
    for name, file in ckpt.index.weight_map.items() if absent else ():
        if name in absent:
            tensor = ckpt.tensors.get(name)
            actual = f"it is in {tensor.file}" if tensor else "no shard contains it"
            yield ctx.finding(
                f"the index maps this tensor to {file}, but {actual}",
                where=Where(name, file),
                observed=tensor.file if tensor else "absent",
                expected=file,
            )
