# SPDX-License-Identifier: Apache-2.0
"""QC405: engines read an exclusion differently."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import READERS, Reader, role

NAMES: dict[Reader, str] = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
# TensorRT-LLM builds only the text model, and strips its prefix.
_NOT_TEXT = frozenset({"vision", "projector"})
_MISSES: tuple[Severity, str] = (
    "error",
    "does not exclude the layer, and builds it quantized for an unquantized weight",
)
_EXCLUDES: tuple[Severity, str] = ("info", "excludes the layer")


@rule(
    "QC405",
    "engines read an exclusion differently",
    severity="warning",
    depth="header",
    unit="unquantized linear layers",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#48508", "NVIDIA/Model-Optimizer#1313"),
    engines={
        "vllm": (
            "warning",
            "reads a pattern as a substring and as a glob, ``x*`` also as ``x``; ``re:`` literally",
        ),
        "sglang": (
            "warning",
            "matches a glob against the whole name or one part of it; ``re:`` literally",
        ),
        "trtllm": (
            "warning",
            "matches a glob against the name without ``language_model.``; ``re:`` literally",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """vLLM, SGLang and TensorRT-LLM exclude the same unquantized linear layers.

    **What it does.** Reads the exclusions as each engine does and compares the results, for
    ModelOpt's declarations of one format. A layer that no engine excludes is QC402, a quantized
    module that some exclude QC401.

    **Why it happens.** A pattern in the dialect of one engine: ``re:`` (compressed-tensors), a
    single part of a name, or a substring.

    **Impact.** An engine that does not understand the pattern builds a quantized layer for a BF16
    weight, and fails or produces garbage.

    **Fix.** List the full Hub name of every unquantized linear layer, without wildcards.
    """
    declaration = ctx.candidate.declaration
    if (
        declaration is None
        or declaration.mixed
        or declaration.algo is None
        or declaration.form not in ("flat", "nested")
    ):
        return
    exclusions = declaration.exclusions
    for module in ctx.candidate.linears:
        if module.quantized or module.weight is None:
            continue
        ctx.tally.see()
        # `loose` includes the dialects of further consumers; a layer excluded in none of them is
        # reported by QC402 or QC403.
        if not exclusions.loose(module.name):
            continue
        kind = role(module.stem)
        readers = [r for r in READERS if r != "trtllm" or kind not in _NOT_TEXT]
        missing = [r for r in readers if not exclusions.excludes(r, module.name)]
        if missing:
            pattern = exclusions.pattern_for(module.name) or ""
            engines = " and ".join(NAMES[r] for r in missing)
            yield ctx.finding(
                f"{pattern!r} excludes this layer for some engines, but not for {engines}",
                where=Where(module.weight.name, module.weight.file),
                observed=pattern,
                expected=module.name,
                engines={r: _MISSES if r in missing else _EXCLUDES for r in READERS},
            )
