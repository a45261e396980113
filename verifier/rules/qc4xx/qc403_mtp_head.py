# SPDX-License-Identifier: Apache-2.0
"""QC403: MTP head is not excluded or only partly quantized."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.mtp import head_and_tail, mtp_modules
from verifier.rules.registry import rule
from verifier.schemes import Module, collapse, fused_groups


@rule(
    "QC403",
    "MTP head is not excluded or only partly quantized",
    severity="error",
    depth="header",
    unit="MTP linear layers",
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
            "builds the head in the declared format and fails to load it (vllm#44087, #49187)",
        ),
        "sglang": ("error", "builds the head in the declared format (sglang#38870)"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every linear layer of an MTP head is either quantized or excluded.

    **What it does.** Checks the modules under ``mtp`` and the layers behind the last one. Experts
    of one MTP layer that are only partly quantized are an error even if the others are listed. A
    linear layer that is quantized in the model but not in its partly quantized head is a warning.
    Fused projections of unequal formats are QC409.

    **Why it happens.** The exclusion list was written for the target model, and the head was copied
    from the source afterwards.

    **Impact.** The draft head is built in the declared format and fails to load, or it runs with
    uninitialized parameters and nearly every draft is rejected.

    **Fix.** List every unquantized linear layer of the head.
    """
    names = mtp_modules(ctx)
    if not names:
        return
    declaration = ctx.candidate.declaration
    modules = [m for m in ctx.candidate.linears if m.name in names]
    ctx.tally.see(len(modules))
    if declaration is not None and not declaration.mixed:
        for module in modules:
            if not module.quantized and declaration.expects(module.name):
                algo = declaration.declared_for(module.name).algo
                yield ctx.finding(
                    "unquantized linear layer of the MTP head without an exclusion:"
                    f" engines expect {algo}",
                    cause="no exclusion",
                    where=_where(module),
                    observed=_dtype(module),
                    expected="an exclusion, or scales",
                )
    yield from _partly_quantized(ctx, modules)


def _partly_quantized(ctx: Context, modules: list[Module]) -> Iterator[Finding]:
    """Yield experts and linear layers of a head that are unquantized, although others are not."""
    mixed_groups: set[str] = set()  # QC409
    for _, group in fused_groups(m.name for m in modules):
        if len({ctx.candidate.modules[name].quantized for name in group}) > 1:
            mixed_groups.update(group)
    heads: dict[str, dict[str, list[Module]]] = {}
    for module in modules:
        head, tail = head_and_tail(module.name)
        if module.name not in mixed_groups:
            heads.setdefault(head, {}).setdefault(collapse(f".{tail}"), []).append(module)
    names = {m.name for m in modules}
    elsewhere = [m for m in ctx.candidate.quantized_modules if m.name not in names]
    quantized_kinds = {collapse(f".{head_and_tail(m.name)[1]}") for m in elsewhere}
    for kinds in heads.values():
        if not any(any(m.quantized for m in members) for members in kinds.values()):
            continue
        for kind, members in kinds.items():
            plain = [m for m in members if not m.quantized]
            if plain and len(plain) < len(members):
                yield ctx.finding(
                    "only some experts of an MTP layer are quantized",
                    cause="some experts",
                    where=_where(plain[0]),
                    observed=f"{_dtype(plain[0])}, {len(plain)} of {len(members)}",
                    expected="one format for all",
                    count=len(plain),
                )
            elif plain and kind in quantized_kinds:
                yield ctx.finding(
                    "unquantized in a partly quantized MTP head, but quantized in the model",
                    cause="partly quantized",
                    where=_where(plain[0]),
                    observed=_dtype(plain[0]),
                    severity="warning",
                    count=len(plain),
                )


def _where(module: Module) -> Where:
    return Where(module.weight.name, module.weight.file) if module.weight else Where(module.name)


def _dtype(module: Module) -> str:
    return module.weight.dtype if module.weight else ""
