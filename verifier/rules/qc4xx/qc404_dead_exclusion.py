# SPDX-License-Identifier: Apache-2.0
"""QC404: an exclusion that matches nothing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC404",
    "exclusion matches no module",
    severity="error",
    depth="header",
    unit="patterns",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#479", "NVIDIA/Model-Optimizer#470", "vllm-project/vllm#54547"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each exclusion matches at least one module on disk, under at least one engine's reading of
    it.

    **Why.** The list is in the exporter's in-memory namespace, or has a hard-coded prefix.
    **Hurts.** What it meant to exclude is not: see QC402.
    **Mend.** Write the list from the tensors on disk, one full name for each unquantized module.
    """
    declaration = ctx.candidate.declaration
    if declaration is None:
        return
    ctx.tally.see(len(declaration.exclude))
    modules = set(ctx.candidate.modules)
    parents = {m.rpartition(".")[0] for m in modules}
    for pattern in declaration.exclusions.dead(modules | parents):
        if pattern in ctx.expectations.wrapped_exclusions:
            continue  # QC209: alive but for a wrapper's part
        # Excluding what is not there harms nobody: every exporter lists the head, tied or not, and
        # MTP heads by habit.
        if pattern.endswith("lm_head") and bool(
            (ctx.checkpoint.config or {}).get("tie_word_embeddings")
        ):
            continue
        absent = ctx.expectations.family is not None and ctx.expectations.family.optional(
            pattern.lstrip("*.")
        )
        yield ctx.finding(
            f"the exclusion {pattern!r} matches no module under any engine's reading",
            where=Where(None, declaration.file),
            observed=pattern,
            severity="warning" if absent else None,
        )
