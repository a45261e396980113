# SPDX-License-Identifier: Apache-2.0
"""QC403: an MTP head that is unquantized and not excluded, or quantized in part."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.mtp import head_and_tail, mtp_modules
from verifier.rules.registry import rule
from verifier.schemes import Module, collapse, fused_groups


@rule(
    "QC403",
    "MTP head is not excluded or partly quantized",
    severity="error",
    depth="header",
    unit="MTP linears",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "vllm-project/vllm#44087",
        "vllm-project/vllm#49187",
        "vllm-project/vllm#41994",
        "sgl-project/sglang#38870",
    ),
    engines={
        "vllm": (
            "error",
            "builds the head in the declared format; the load asserts (vllm#44087, #49187)",
        ),
        "sglang": ("error", "builds the head in the declared format (sglang#38870)"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """An MTP head (``mtp.…``, or the layers behind the last) is quantized throughout, or excluded
    where it is not.

    **Why.** The exclusion list was written for the target model; the head was copied from the
    source afterwards.
    **Hurts.** The draft head is built in the declared format and the load fails, or it is built
    from parameters never written and nearly every draft is refused.
    **Mend.** List every unquantized linear of the head. Experts of one MTP layer that are quantized
    in part are an error even where the rest is listed; a kind of linear that is quantized in the
    model and not in its half-quantized head is a warning. (Fused projections of unequal formats are
    QC409.)
    """
    names = mtp_modules(ctx)
    if not names:
        return
    declaration = ctx.candidate.declaration
    modules = [m for m in ctx.candidate.linears if m.name in names]
    ctx.tally.see(len(modules))
    if declaration is not None and not declaration.mixed and declaration.algo is not None:
        for module in modules:
            if not module.quantized and not declaration.exclusions.loose(module.name):
                yield ctx.finding(
                    f"a linear of the MTP head is not quantized, and no exclusion covers it: engines expect"
                    f" {declaration.algo} here",
                    where=_where(module),
                    observed=_dtype(module),
                    expected="an exclusion, or scales",
                )
    yield from _in_part(ctx, modules)


def _in_part(ctx: Context, modules: list[Module]) -> Iterator[Finding]:
    split = {
        m
        for _, members in fused_groups(m.name for m in modules)
        for m in members
        if len({ctx.candidate.modules[x].quantized for x in members}) > 1
    }
    heads: dict[str, dict[str, list[Module]]] = {}
    for module in modules:
        head, tail = head_and_tail(module.name)
        if module.name not in split:
            heads.setdefault(head, {}).setdefault(collapse(f".{tail}"), []).append(module)
    in_model = {
        collapse(f".{head_and_tail(m.name)[1]}")
        for m in ctx.candidate.quantized_modules
        if m.name not in {x.name for x in modules}
    }
    for kinds in heads.values():
        if not any(m.quantized for members in kinds.values() for m in members):
            continue
        for kind, members in kinds.items():
            plain = [m for m in members if not m.quantized]
            if plain and len(plain) < len(members):
                yield ctx.finding(
                    "only part of one MTP layer's experts is quantized",
                    where=_where(plain[0]),
                    observed=f"{_dtype(plain[0])}, {len(plain)} of {len(members)}",
                    expected="one format for all",
                    count=len(plain),
                )
            elif plain and kind in in_model:
                yield ctx.finding(
                    "not quantized in the MTP head, which is quantized elsewhere and whose model quantizes this linear",
                    where=_where(plain[0]),
                    observed=_dtype(plain[0]),
                    severity="warning",
                    count=len(plain),
                )


def _where(module: Module) -> Where:
    return Where(module.weight.name, module.weight.file) if module.weight else Where(module.name)


def _dtype(module: Module) -> str:
    return module.weight.dtype if module.weight else ""
