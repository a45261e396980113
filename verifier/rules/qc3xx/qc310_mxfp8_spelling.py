# SPDX-License-Identifier: Apache-2.0
"""QC310: weight scale has an unexpected name."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module

_REJECTED: dict[str, tuple[Severity, str]] = {
    "vllm": ("error", "has no parameter of this name and stops (vLLM 0.32, run on a CPU)")
}
PLAIN, INVERSE = "weight_scale", "weight_scale_inv"
INVERSE_FAMILIES = frozenset({"minimax_m2", "minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"})
"""Families that name E8M0 scales ``weight_scale_inv`` on the Hub; vLLM's loaders rename them."""


@rule(
    "QC310",
    "weight scale has an unexpected name",
    severity="warning",
    depth="header",
    unit="MXFP8 scales",
    consumers=("TensorRT-LLM", "vLLM", "SGLang"),
    sources=("NVIDIA/TensorRT-LLM#13716",),
    engines={
        "vllm": (
            "warning",
            "its MiniMax-M3 loader renames weight_scale_inv; other loaders do not know it",
        ),
        "trtllm": (
            "warning",
            "always renames, which breaks weight_scale (NVIDIA/TensorRT-LLM#13716)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """All MXFP8 scales have one name, the one that goes with their family and declaration.

    **What it does.** Compares the names of all MXFP8 scales. ModelOpt writes ``weight_scale``;
    MiniMax's own checkpoints, and exports that keep their bytes, write ``weight_scale_inv``. The
    values mean the same. Blocks of FP8 under ``quant_method: fp8`` are ``weight_scale_inv``, and an
    error otherwise. MiniMax with ModelOpt's name is only a note: vLLM's loader accepts both.

    **Why it happens.** Two exports were merged, or one vendor's convention was used with a
    different vendor's declaration.

    **Impact.** A loader that renames (or does not) misses the scale: an unknown parameter, or one
    that stays uninitialized.

    **Fix.** Rename the tensors in the headers and in the index; the data does not change.
    """
    yield from _unread_leaves(ctx)
    modules = ctx.candidate.in_file_order(
        group
        for group in ctx.candidate.module_groups
        if group.format and group.format.name == "mxfp8" and group.first.scale is not None
    )
    ctx.tally.see(len(modules))
    plain = [m for m in modules if PLAIN in m.parts]
    inverse = [m for m in modules if INVERSE in m.parts]
    expected, severity = _expected_name(ctx)
    for module in plain:
        if INVERSE in module.parts:
            yield ctx.finding(
                "the module stores its scale under both names",
                cause="both names",
                tensor=module.parts[INVERSE].name,
                observed=f"{PLAIN} and {INVERSE}",
                expected=expected or "one of them",
            )
    if plain and inverse:
        minority = inverse if len(inverse) < len(plain) else plain
        leaf = INVERSE if minority is inverse else PLAIN
        for module in minority:
            if not (PLAIN in module.parts and INVERSE in module.parts):
                yield ctx.finding(
                    "most MXFP8 scales of the checkpoint have a different name",
                    cause="minority",
                    tensor=module.parts[leaf].name,
                    observed=leaf,
                    expected=PLAIN if leaf == INVERSE else INVERSE,
                )
    elif modules and expected and expected not in modules[0].parts:
        leaf = INVERSE if inverse else PLAIN
        yield ctx.finding(
            "MXFP8 scales do not have the name that this family and declaration use",
            cause="family name",
            tensor=modules[0].parts[leaf].name,
            observed=leaf,
            expected=expected,
            count=len(modules),
            severity=severity,
            engines=_REJECTED if leaf == INVERSE and severity == "warning" else None,
        )


def _unread_leaves(ctx: Context) -> Iterator[Finding]:
    """Yield scales of blocks of FP8 under a name that readers of their declaration do not know."""
    wrong = []
    groups = [group for group in ctx.candidate.module_groups if _leaf_read(ctx, group.first)]
    for module in ctx.candidate.in_file_order(groups):
        leaf, scale = _leaf_read(ctx, module), module.scale
        if scale is None:
            continue
        if scale.name.rpartition(".")[2] not in (leaf, "scale"):  # DeepSeek-V4's loaders map it
            wrong.append((leaf, scale))
    if wrong:
        leaf, scale = wrong[0]
        stored = scale.name.rpartition(".")[2]
        yield ctx.finding(
            f"scales are called {stored}, but readers of this declaration look for {leaf}",
            cause="unread name",
            tensor=scale.name,
            observed=stored,
            expected=leaf,
            count=len(wrong),
            severity="error",
        )


def _leaf_read(ctx: Context, module: Module) -> str:
    """Return the name that readers of a module's declaration look for, where the format has it; ''
    for any.
    """
    declared, fmt = ctx.candidate.declared_for(module), ctx.candidate.format_of(module)
    leaf = declared.scheme.scale_leaf if declared and declared.scheme else ""
    return leaf if fmt and fmt.name != "mxfp8" and fmt.sibling(leaf) is not None else ""


def _expected_name(ctx: Context) -> tuple[str, Severity]:
    """Return the expected name of the scales, '' if unknown, and the severity of any other."""
    declaration = ctx.candidate.declaration
    if declaration is None:
        return "", "warning"
    if declaration.form == "vendor":
        return (INVERSE, "warning") if declaration.method == "mxfp8" else ("", "warning")
    if ctx.checkpoint.model_type in INVERSE_FAMILIES:
        return INVERSE, "info"
    # What loaders rename is known for known families only.
    return (PLAIN if ctx.expectations.family is not None else "", "warning")
