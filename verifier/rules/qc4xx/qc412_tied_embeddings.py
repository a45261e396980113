# SPDX-License-Identifier: Apache-2.0
"""QC412: tie_word_embeddings contradicts itself, or the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import role

FLAG = "tie_word_embeddings"


@rule(
    "QC412",
    "tie_word_embeddings at the wrong level",
    severity="warning",
    depth="header",
    unit="flags",
    consumers=("vLLM", "SGLang", "transformers"),
    sources=(
        "vllm-project/vllm#51063",
        "vllm-project/vllm#48670",
        "huggingface/transformers#45156",
    ),
    engines={
        "vllm": (
            "warning",
            "the top level wins over text_config: a real lm_head is ignored (vllm#51063)",
        ),
        "transformers": (
            "warning",
            "reads the level that the model's class reads (transformers#45156)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``tie_word_embeddings`` says the same at the top of config.json and in ``text_config``, and
    fits the tensors.

    **Why.** A composite config was written from its text part, or with the class's default.
    **Hurts.** The top level wins: a real ``lm_head`` is ignored and logits come from the embedding;
    or an engine waits for a head that is not there.
    **Mend.** Write the same flag at both levels: true without a head of its own, false with one. (A
    head that the layout expects and that is absent is QC205's.)
    """
    config = ctx.checkpoint.config or {}
    text = config.get("text_config")
    top = config.get(FLAG)
    inner = text.get(FLAG) if isinstance(text, Mapping) else None
    head = next((m for m in ctx.candidate.modules if role(m) == "lm_head"), None)
    has = f"{head} is on disk" if head else "no lm_head is on disk"
    where = Where(None, "config.json")
    for value in (top, inner):
        if value is not None:
            ctx.tally.see()
        if value is not None and not isinstance(value, bool):
            yield ctx.finding(
                f"{FLAG} is neither true nor false", where=where, observed=str(value)[:60]
            )
            return
    if top is not None and inner is not None and top != inner:
        yield ctx.finding(
            f"{FLAG} differs between the top level, which engines read, and text_config",
            where=where,
            observed=f"{_json(top)} above, {_json(inner)} in text_config; {has}",
            expected=_json(head is None),
        )
    elif (
        head is None
        and (top if top is not None else inner) is False
        and not ctx.expectations.shapes
    ):
        yield ctx.finding(
            f"{FLAG} is false and there is no lm_head",
            where=where,
            observed=has,
            expected="a head, or true",
        )
    elif head is None and top is None and inner is True:
        yield ctx.finding(
            f"{FLAG} is true in text_config only, and engines that read the top level wait for an lm_head",
            where=where,
            observed=has,
            expected="true at both levels",
        )


def _json(value: bool) -> str:
    return "true" if value else "false"
