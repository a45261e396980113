# SPDX-License-Identifier: Apache-2.0
"""QC405: engines disagree on what the exclusions exclude."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import READERS, Reader, role

NAMES: dict[Reader, str] = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
# TensorRT-LLM builds the text model alone, and strips its prefix.
_NOT_TEXT = frozenset({"vision", "projector"})
_BUILT: tuple[Severity, str] = (
    "error",
    "reads it otherwise, and builds a quantized layer for an unquantized weight",
)
_READ: tuple[Severity, str] = ("info", "reads the pattern so")


@rule(
    "QC405",
    "engines read an exclusion differently",
    severity="warning",
    depth="header",
    unit="unquantized linears",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#48508", "NVIDIA/Model-Optimizer#1313"),
    engines={
        "vllm": (
            "warning",
            "reads a pattern as a substring and as a glob, ``x*`` as ``x`` and ``x.*``; ``re:`` literally",
        ),
        "sglang": (
            "warning",
            "reads a glob on the whole name or on one part of it; ``re:`` literally",
        ),
        "trtllm": (
            "warning",
            "reads a glob on the whole name without ``language_model.``; ``re:`` literally",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """vLLM, SGLang and TensorRT-LLM exclude the same unquantized linears, each by its own reading
    of the patterns.

    **Why.** A pattern in the dialect of one consumer: ``re:`` (compressed-tensors), a lone part of
    a name, a piece of one.
    **Hurts.** An engine that does not read it builds a quantized layer for a BF16 weight, and fails
    or serves garbage.
    **Mend.** List the full hub name of every unquantized linear, without wildcards. QuantizedCheckpoint for
    ModelOpt's declarations of one format; what no engine excludes is QC402, a quantized module that
    some exclude QC401.
    """
    declaration = ctx.candidate.declaration
    if (
        declaration is None
        or declaration.mixed
        or declaration.algo is None
        or declaration.form == "vendor"
    ):
        return
    exclusions = declaration.exclusions
    for module in ctx.candidate.linears:
        if module.quantized or module.weight is None:
            continue
        ctx.tally.see()
        # `loose` also knows consumers that are none of these: where nobody at all reads it so,
        # QC402 and QC403 speak.
        if not exclusions.loose(module.name):
            continue
        kind = role(module.name)
        readers = [r for r in READERS if r != "trtllm" or kind not in _NOT_TEXT]
        blind = [r for r in readers if not exclusions.excludes(r, module.name)]
        if blind:
            pattern = exclusions.pattern_for(module.name) or ""
            yield ctx.finding(
                f"excluded by {pattern!r} as some consumers read it, and not as"
                f" {' and '.join(NAMES[r] for r in blind)} read it",
                where=Where(module.weight.name, module.weight.file),
                observed=pattern,
                expected=module.name,
                engines={r: _BUILT if r in blind else _READ for r in READERS},
            )
