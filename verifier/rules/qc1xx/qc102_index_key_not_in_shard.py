# SPDX-License-Identifier: Apache-2.0
"""QC102: the index lists a tensor that the named shard does not hold."""

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
        "vllm": ("warning", "reads the headers only and does not notice the entry"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every name in the index must stand in the header of the shard that the index names.

    **Why.** The index was copied from the source model, or an exporter renamed tensors and not the
    index.
    **Hurts.** transformers raises or leaves the parameter random; vLLM reads headers only and does
    not notice.
    **Mend.** Write the index again from the shards' headers.
    """
    ckpt = ctx.checkpoint
    if ckpt.index is None:
        return
    whole = {
        s.file: s.tensors for s in ckpt.shards if not s.problems
    }  # QC101 and QC104 speak of the others
    known = [(name, file) for name, file in ckpt.index.weight_map.items() if file in whole]
    ctx.tally.see(len(known))
    for name, file in known:
        if name not in whole[file]:
            elsewhere = ckpt.tensors.get(name)
            where = f"it is in {elsewhere.file}" if elsewhere else "no shard holds it"
            yield ctx.finding(
                f"the index says the tensor is in {file}, and its header does not list it: {where}",
                where=Where(name, file),
                observed=elsewhere.file if elsewhere else "absent",
                expected=file,
            )
