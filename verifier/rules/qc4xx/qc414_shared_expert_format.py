# SPDX-License-Identifier: Apache-2.0
"""QC414: shared experts use a different format than routed experts."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format, Module, expert_key, role, same_layout


@rule(
    "QC414",
    "shared experts use a different format than routed experts",
    severity="info",
    depth="header",
    unit="layers with shared experts",
    consumers=("SGLang",),
    sources=("sgl-project/sglang#33670", "sgl-project/sglang#40628"),
    engines={
        "sglang": (
            "warning",
            "for some families, fuses shared experts into the routed ones, in one format",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The shared and routed experts of a layer use one format, unless a mixed release differs.

    **What it does.** Compares the format of each layer's shared expert with that of its routed
    experts.

    **Why it happens.** A recipe quantizes routed experts to four bits and keeps the shared one at
    eight, as MiniMax-M3's does.

    **Impact.** An engine that fuses the shared expert into the routed ones crashes on its shape
    (6144 against 3072), or reads one format as the other.

    **Fix.** None, if it is intended; serve with ``--disable-shared-experts-fusion`` where SGLang
    fuses them.
    """
    routed: dict[str, Module] = {}
    shared: dict[str, Module] = {}
    by_stem: dict[str, Module] = {}
    for module in ctx.candidate.linears:
        by_stem.setdefault(module.stem, module)
    for module in by_stem.values():
        if ".shared_expert" in module.name and role(module.name) == "shared_expert":
            shared.setdefault(module.name[: module.name.index(".shared_expert")], module)
        elif key := expert_key(module.name):
            routed.setdefault(key.container.removesuffix(".experts"), module)
    for layer, module in shared.items():
        expert = routed.get(layer)
        if expert is None or module.weight is None:
            continue
        fmt, routed_fmt = ctx.candidate.format_of(module), ctx.candidate.format_of(expert)
        if (module.quantized and fmt is None) or (expert.quantized and routed_fmt is None):
            ctx.tally.miss(1, "a format is not known")
            continue
        ctx.tally.see()
        if not _same_format(fmt, routed_fmt):
            yield ctx.finding(
                "shared experts use a different format than the routed experts",
                where=Where(module.weight.name, module.weight.file),
                observed=fmt.algo if fmt else f"unquantized {module.weight.dtype}",
                expected=f"{routed_fmt.algo if routed_fmt else 'unquantized'}"
                " like the routed experts",
            )


def _same_format(a: Format | None, b: Format | None) -> bool:
    return a is b if a is None or b is None else same_layout(a, b)
