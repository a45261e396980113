# SPDX-License-Identifier: Apache-2.0
"""QC412: tie_word_embeddings is inconsistent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import role
from verifier.text import json_text

FLAG = "tie_word_embeddings"


@rule(
    "QC412",
    "tie_word_embeddings is inconsistent",
    severity="warning",
    depth="header",
    unit="flags",
    repairable=True,
    consumers=("vLLM", "SGLang", "transformers"),
    sources=(
        "vllm-project/vllm#51063",
        "vllm-project/vllm#48670",
        "huggingface/transformers#45156",
    ),
    engines={
        "vllm": (
            "warning",
            "prefers the top level to text_config; 0.32 loads a stored head all the same",
        ),
        "transformers": (
            "warning",
            "reads the level that the model class defines (transformers#45156)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``tie_word_embeddings`` is the same in config.json and ``text_config``, and fits the tensors.

    **What it does.** Compares the flag at both levels with each other and with the stored
    ``lm_head``. A head that the layout expects and that is missing is QC205.

    **Why it happens.** A composite config was written from its text part, or with the default of
    its class.

    **Impact.** The top level wins: releases of vLLM before 0.32 ignore a separate ``lm_head`` and
    compute logits from the embedding (vllm#51063), or an engine expects a head that does not exist.

    **Fix.** Write the same flag at both levels: true without a separate head, false with one.
    """
    config = ctx.checkpoint.config or {}
    text = config.get("text_config")
    top = config.get(FLAG)
    inner = text.get(FLAG) if isinstance(text, Mapping) else None
    head = next((n for n, m in ctx.candidate.modules.items() if role(m.stem) == "lm_head"), None)
    stored = f"{head} is stored" if head else "no lm_head is stored"
    where = Where(None, "config.json")
    for value in (top, inner):
        if value is not None:
            ctx.tally.see()
        if value is not None and not isinstance(value, bool):
            yield ctx.finding(
                f"{FLAG} is neither true nor false",
                cause="not a flag",
                where=where,
                observed=json_text(value, 60),
            )
            return
    if top is not None and inner is not None and top != inner:
        yield ctx.finding(
            f"{FLAG} differs between text_config and the top level, which engines read",
            cause="levels differ",
            where=where,
            observed=f"top level {json_text(top)}, text_config {json_text(inner)}; {stored}",
            expected=json_text(head is None),
        )
    elif (
        head is None
        and (top if top is not None else inner) is False
        and not ctx.expectations.shapes
    ):
        yield ctx.finding(
            f"{FLAG} is false, but there is no lm_head",
            cause="no head",
            where=where,
            observed=stored,
            expected="an lm_head, or true",
        )
    elif head is None and top is None and inner is True:
        yield ctx.finding(
            f"{FLAG} is true only in text_config: engines that read the top level expect a head",
            cause="text_config only",
            where=where,
            observed=stored,
            expected="true at both levels",
        )
