# SPDX-License-Identifier: Apache-2.0
"""QC416: tied head is not excluded."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.layouts.engine_needs import asked_names, untensored_heads
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import ENGINES


@rule(
    "QC416",
    "tied head is not excluded",
    severity="warning",
    depth="header",
    unit="heads without a tensor",
    consumers=("vLLM",),
    sources=("vLLM 0.32 modelopt.py ModelOptQuantConfigBase.get_quant_method, run on a CPU",),
    engines={
        "vllm": (
            "error",
            "builds a quantized head: NVFP4 stops, the scales of MXFP8 are never set",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """An output head that is tied to the embedding, and so has no tensor, is excluded by name.

    **What it does.** Looks for the head in the exclusions of a ModelOpt checkpoint of one format
    that stores an embedding and no head. A head that has a tensor is QC402.

    **Why it happens.** The exclusions were written from the stored tensors alone.

    **Impact.** vLLM builds the head as a quantized layer of its own before it ties it: NVFP4 stops
    with "weight_scale … was never loaded", and MXFP8 gives non-finite logits.

    **Fix.** Add ``lm_head`` to the exclusions of both configs.
    """
    declaration = ctx.candidate.declaration
    if declaration is None or declaration.mixed or declaration.form not in ("flat", "nested"):
        return
    if not declaration.schemes():
        return
    stems = {m.stem for m in ctx.candidate.modules.values()}
    for head in untensored_heads(stems, ctx.checkpoint.config):
        ctx.tally.see()
        names = asked_names(head, ctx.checkpoint.model_type, ENGINES)
        if declaration.expects(head) or any(not name.asked for name in names):
            yield ctx.finding(
                "the head is tied to the embedding and not excluded",
                where=Where(head, declaration.file),
                observed="no exclusion",
                expected=head,
            )
