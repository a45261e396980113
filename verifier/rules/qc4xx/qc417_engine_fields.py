# SPDX-License-Identifier: Apache-2.0
"""QC417: config.json lacks a field that an engine reads."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.layouts.engine_needs import REQUIRED_FIELDS
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC417",
    "config.json lacks a field that an engine reads",
    severity="warning",
    depth="header",
    unit="fields",
    consumers=("vLLM",),
    sources=("vLLM 0.32 models/minimax_m3, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """config.json has the fields of the family that engines read, in the release's spelling.

    **What it does.** Looks up the fields that an engine reads and transformers spells differently.
    Known for MiniMax-M3: vLLM reads ``img_token_compression_config``, ``sparse_attention_config``
    and ``moe_layer_freq``, for which transformers writes fields of its own.

    **Why it happens.** config.json was written by ``save_pretrained``, and not copied from the
    release.

    **Impact.** vLLM stops, or builds the layers of the released model and not those of this one.

    **Fix.** Copy config.json from the release and add ``quantization_config`` to it.
    """
    config = ctx.checkpoint.config
    if config is None:
        return
    fields = [f for f in REQUIRED_FIELDS if ctx.checkpoint.model_type in f.families]
    ctx.tally.see(len(fields))
    for field in fields:
        if not field.present(config):
            yield ctx.finding(
                f"{field.path} is missing",
                cause=field.path,
                where=Where(None, "config.json"),
                observed="absent",
                expected=field.path,
                engines={field.engine: ("error", field.effect)},
            )
