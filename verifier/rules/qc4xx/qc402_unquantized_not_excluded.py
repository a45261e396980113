# SPDX-License-Identifier: Apache-2.0
"""QC402: unquantized module is not excluded."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.mtp import mtp_modules
from verifier.rules.registry import rule
from verifier.schemes import Declaration, Module, role


@rule(
    "QC402",
    "unquantized module is not excluded",
    severity="error",
    depth="header",
    unit="unquantized linear layers",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1858", "vllm-project/vllm#52501"),
    engines={
        "vllm": ("error", "builds a packed parameter: a size error, or NaN after loading"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """In a checkpoint of one format, every unquantized linear layer is excluded.

    **What it does.** Matches each unquantized linear layer against the exclusions. With
    MIXED_PRECISION, a module without an entry is unquantized by definition, and the rule does not
    apply. MTP heads are QC403; a layer that only some engines read as excluded is QC405.

    **Why it happens.** Routers are not nn.Linear in transformers 5 and are easily forgotten, or the
    patterns use names of a different namespace.

    **Impact.** The engine builds a packed parameter for the layer: a size error, or NaN after
    loading.

    **Fix.** List the full Hub name of every unquantized linear layer.
    """
    declaration = ctx.candidate.declaration
    if declaration is None or declaration.mixed or not declaration.schemes():
        return
    mtp = mtp_modules(ctx)
    for module in ctx.candidate.linears:
        if module.quantized or module.name in mtp:  # QC403
            continue
        ctx.tally.see()
        weight = module.weight
        head = _is_declared_head(declaration, module)
        if (head or declaration.expects(module.name)) and weight is not None:
            algo = declaration.declared_for(module.name).algo
            yield ctx.finding(
                f"{weight.dtype} weight without an exclusion: engines expect {algo}",
                where=Where(weight.name, weight.file),
                observed=weight.dtype,
                expected="an exclusion, or scales",
                engines=_HEAD if head else None,
            )


_HEAD: dict[str, tuple[Severity, str]] = {
    "vllm": ("info", "takes no head for a Linear, and builds it unquantized"),
    "sglang": ("info", "takes no head for a Linear, and builds it unquantized"),
}


def _is_declared_head(declaration: Declaration, module: Module) -> bool:
    """Whether compressed-tensors' own reader takes a head for one of its ``Linear`` targets."""
    return (
        declaration.form == "compressed-tensors"
        and role(module.name) == "lm_head"
        and declaration.declared_for(module.name).algo is not None
    )
