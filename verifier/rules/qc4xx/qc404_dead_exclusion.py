# SPDX-License-Identifier: Apache-2.0
"""QC404: exclusion matches no module."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.layouts.engine_needs import HEAD, all_asked_names, untensored_heads
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import CLASS_NAME, ENGINES, Declaration, Names


@rule(
    "QC404",
    "exclusion matches no module",
    severity="error",
    depth="header",
    unit="patterns",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#479", "NVIDIA/Model-Optimizer#470", "vllm-project/vllm#54547"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each exclusion matches at least one module, as at least one engine reads it.

    **What it does.** Matches the exclusions against the stored modules. An exclusion of a part that
    the family leaves out by design is a warning, one of a tied ``lm_head`` is not reported. An
    exclusion that fails only because of a wrapper's part is QC209. A target of a group that names
    no module is a warning.

    **Why it happens.** The list uses the exporter's in-memory names, or has a hard-coded prefix.

    **Impact.** The layers that it was meant to exclude are not excluded (QC402).

    **Fix.** Write the list from the stored tensors, with one full name per unquantized module.
    """
    declaration = ctx.candidate.declaration
    if declaration is None:
        return
    ctx.tally.see(len(declaration.exclude))
    modules = set(ctx.candidate.modules)
    parents = {m.rpartition(".")[0] for m in modules}
    stems = {m.stem for m in ctx.candidate.modules.values()}
    tied = bool(untensored_heads(stems, ctx.checkpoint.config))
    asked = all_asked_names(modules, ctx.checkpoint.model_type, ENGINES)
    for pattern in declaration.exclusions.dead(modules | parents):
        if pattern in ctx.expectations.wrapped_exclusions:
            continue  # QC209
        # Engines build a tied head, although it has no tensor.
        if (pattern.endswith(HEAD) and tied) or pattern in asked:
            continue
        absent = ctx.expectations.family is not None and ctx.expectations.family.optional(
            pattern.lstrip("*.")
        )
        harmless = absent or declaration.form not in ("flat", "nested")
        yield ctx.finding(
            f"the exclusion {pattern!r} matches no module in any engine's dialect",
            cause=f"exclusion {pattern}",
            where=Where(None, declaration.file),
            observed=pattern,
            severity="warning" if harmless else None,
        )
    yield from _dead_targets(ctx, declaration)


def _dead_targets(ctx: Context, declaration: Declaration) -> Iterator[Finding]:
    """Yield targets of compressed-tensors' groups that name no module; classes are not checked."""
    if declaration.form != "compressed-tensors":
        return
    modules = list(ctx.candidate.modules)
    for group in declaration.groups:
        for target in group.targets:
            if CLASS_NAME.match(target):
                continue
            ctx.tally.see()
            names = Names([target])
            parents = (m.rpartition(".")[0] for m in modules)
            if any(map(names.by_name, modules)) or any(map(names.by_name, parents)):
                continue
            yield ctx.finding(
                f"the target {target!r} of {group.name} matches no module",
                cause=f"target {target}",
                where=Where(None, declaration.file),
                observed=target,
                severity="warning",
            )
