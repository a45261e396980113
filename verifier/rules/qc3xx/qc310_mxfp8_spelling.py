# SPDX-License-Identifier: Apache-2.0
"""QC310: MXFP8 scales under two names, or under another than the loader's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity
from verifier.rules.context import Context
from verifier.rules.registry import rule

PLAIN, INVERSE = "weight_scale", "weight_scale_inv"
INVERSE_FAMILIES = frozenset({"minimax_m2", "minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"})
"""Families whose hub checkpoints say ``weight_scale_inv`` for E8M0 scales; vLLM's loaders rename
it."""


@rule(
    "QC310",
    "MXFP8 scale has another spelling",
    severity="warning",
    depth="header",
    unit="MXFP8 scales",
    consumers=("TensorRT-LLM", "vLLM", "SGLang"),
    sources=("NVIDIA/TensorRT-LLM#13716",),
    engines={
        "vllm": (
            "warning",
            "its MiniMax-M3 loader renames weight_scale_inv; other loaders know no such parameter",
        ),
        "trtllm": (
            "warning",
            "renames blindly, which breaks the other spelling (NVIDIA/TensorRT-LLM#13716)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """All MXFP8 scales of a checkpoint have one name, the one that its family and declaration go
    with.

    ModelOpt writes ``weight_scale``; MiniMax's own checkpoints, and what keeps their bytes,
    ``weight_scale_inv``. The values mean the same. MiniMax under ModelOpt's name is a note: vLLM's
    loader takes both.

    **Why.** Two exports were merged, or one vendor's convention was used with the other's
    declaration.
    **Hurts.** A loader that renames, or does not, leaves the scale out: an unknown parameter, or
    one never written.
    **Mend.** Rename the tensors in headers and index; no byte of data changes.
    """
    found = [m for m, f in ctx.candidate.formatted if f.name == "mxfp8" and m.scale is not None]
    ctx.tally.see(len(found))
    plain = [m for m in found if PLAIN in m.parts]
    inverse = [m for m in found if INVERSE in m.parts]
    for module in plain:
        if INVERSE in module.parts:
            yield ctx.finding(
                "one module has its scale under both names",
                tensor=module.parts[INVERSE].name,
                observed=f"{PLAIN} and {INVERSE}",
                expected=_wanted(ctx)[0] or "one",
            )
    wanted, severity = _wanted(ctx)
    if plain and inverse:
        odd = inverse if len(inverse) < len(plain) else plain
        leaf = INVERSE if odd is inverse else PLAIN
        for module in odd:
            if not (PLAIN in module.parts and INVERSE in module.parts):
                yield ctx.finding(
                    "most MXFP8 scales of the checkpoint have the other name",
                    tensor=module.parts[leaf].name,
                    observed=leaf,
                    expected=PLAIN if leaf == INVERSE else INVERSE,
                )
    elif found and wanted and wanted not in found[0].parts:
        leaf = INVERSE if inverse else PLAIN
        yield ctx.finding(
            "MXFP8 scales do not have the name that goes with this family and declaration",
            tensor=found[0].parts[leaf].name,
            observed=leaf,
            expected=wanted,
            count=len(found),
            severity=severity,
        )


def _wanted(ctx: Context) -> tuple[str, Severity]:
    """Return the name that scales should have, or '' where nothing says so, and how bad another
    is.
    """
    declaration = ctx.candidate.declaration
    if declaration is None:
        return "", "warning"
    if declaration.form == "vendor":
        return (INVERSE, "warning") if declaration.method == "mxfp8" else ("", "warning")
    if ctx.checkpoint.model_type in INVERSE_FAMILIES:
        return INVERSE, "info"
    return (
        PLAIN if ctx.expectations.family is not None else "",
        "warning",
    )  # of other families nobody knows what a loader renames
