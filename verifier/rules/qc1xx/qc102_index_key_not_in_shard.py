# SPDX-License-Identifier: Apache-2.0
"""QC102: the index lists a tensor that the named shard does not hold."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC102", "indexed tensor is not in its shard", severity="error", depth="header", unit="index entries",
    consumers=("transformers", "SGLang"), sources=("ByteDance-Seed/VeOmni#799",),
    engines={
        "vllm": ("warning", "reads the headers only and does not notice the entry"),
    },
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """Every name in the index must stand in the header of the shard that the index names.

    **Why.** The index was copied from the source model, or an exporter renamed tensors and not the index.
    **Hurts.** transformers raises or leaves the parameter random; vLLM reads headers only and does not notice.
    **Mend.** Write the index again from the shards' headers.
    """
    ckpt = ctx.checkpoint
    if ckpt.index is None:
        return
    shards = {s.file: s for s in ckpt.shards}
    for name, file in ckpt.index.weight_map.items():
        shard = shards.get(file)
        if shard is None or shard.problems:
            continue  # QC101 and QC104 speak of those
        ctx.tally.see()
        if name not in shard.tensors:
            elsewhere = ckpt.tensors.get(name)
            where = f"it is in {elsewhere.file}" if elsewhere else "no shard holds it"
            yield ctx.finding(
                f"the index says the tensor is in {file}, and its header does not list it: {where}",
                where=Where(name, file), observed=elsewhere.file if elsewhere else "absent", expected=file,
            )  # fmt: skip
