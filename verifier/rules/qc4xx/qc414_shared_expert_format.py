# SPDX-License-Identifier: Apache-2.0
"""QC414: shared experts have another format than the routed ones beside them."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, expert_key, role, same_layout


@rule(
    "QC414",
    "shared experts in another format",
    severity="info",
    depth="header",
    unit="layers with shared experts",
    consumers=("SGLang",),
    sources=("sgl-project/sglang#33670", "sgl-project/sglang#40628"),
    engines={
        "sglang": (
            "warning",
            "fuses shared experts into the routed ones by default for some families, in one format",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Shared and routed experts of a layer are in one format; a mixed release may say otherwise on
    purpose.

    **Why.** A recipe that quantizes routed experts to four bits and keeps the shared one at eight:
    MiniMax-M3's.
    **Hurts.** An engine that fuses the shared expert into the routed ones crashes on its shape
    (6144 against 3072), or reads one format as the other.
    **Mend.** Nothing, if it is meant; serve with ``--disable-shared-experts-fusion`` where SGLang
    fuses.
    """
    routed: dict[str, Module] = {}
    shared: dict[str, Module] = {}
    for module in ctx.candidate.linears:
        if ".shared_expert" in module.name and role(module.name) == "shared_expert":
            shared.setdefault(module.name[: module.name.index(".shared_expert")], module)
        elif key := expert_key(module.name):
            routed.setdefault(key.container.removesuffix(".experts"), module)
    for layer, module in shared.items():
        other = routed.get(layer)
        if other is None or module.weight is None:
            continue
        ours, theirs = ctx.candidate.format_of(module), ctx.candidate.format_of(other)
        if (module.quantized and ours is None) or (other.quantized and theirs is None):
            ctx.tally.miss(1, "a format is not known")
            continue
        ctx.tally.see()
        if (ours is None) != (theirs is None) or (
            ours and theirs and not same_layout(ours, theirs)
        ):
            yield ctx.finding(
                "shared experts are in another format than the routed experts of their layer",
                where=Where(module.weight.name, module.weight.file),
                observed=ours.algo if ours else f"unquantized {module.weight.dtype}",
                expected=f"{theirs.algo if theirs else 'unquantized'}, as the routed",
            )
