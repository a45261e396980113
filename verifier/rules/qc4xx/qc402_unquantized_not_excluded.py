# SPDX-License-Identifier: Apache-2.0
"""QC402: unquantized module is not excluded."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Severity, Where
from verifier.layouts.engine_needs import asked_names
from verifier.rules.context import Context
from verifier.rules.mtp import mtp_modules
from verifier.rules.registry import rule
from verifier.schemes import ROUTERS_BY_CONFIG, Declaration, Module, role


@rule(
    "QC402",
    "unquantized module is not excluded",
    severity="error",
    depth="header",
    unit="unquantized linear layers",
    repairable=True,
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
    apply. MTP heads are QC403; a layer that only some engines read as excluded is QC405. A layer
    that vLLM looks up by a different name than the one on disk is an error for vLLM, and a warning
    otherwise.

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
        some = _of_some_engines(ctx, declaration, module)
        if (some or declaration.expects(module.name)) and weight is not None:
            algo = declaration.declared_for(module.name).algo
            yield ctx.finding(
                f"{weight.dtype} weight without an exclusion: engines expect {algo}",
                cause="no exclusion",
                where=Where(weight.name, weight.file),
                observed=weight.dtype,
                expected="an exclusion, or scales",
                engines=some,
            )
        elif weight is not None:
            yield from _asked_differently(ctx, declaration, module, weight)


Effects = dict[str, tuple[Severity, str]]
_HEAD: Effects = {
    engine: ("info", "takes no head for a Linear, and builds it unquantized")
    for engine in ("vllm", "sglang")
}
_FROM_HEADERS: Effects = {
    "vllm": ("info", "takes the list of quantized layers from the headers"),
}
_BY_CONFIG: Effects = {"vllm": ("error", "builds the family's routers as the config says")}
_BLOCK = frozenset({"attention", "mlp", "routed_expert", "shared_expert"})


def _asked_differently(
    ctx: Context, declaration: Declaration, module: Module, weight: Tensor
) -> Iterator[Finding]:
    """Yield an excluded layer that an engine looks up by a name that no exclusion matches."""
    if declaration.form not in ("flat", "nested"):
        return
    for name in asked_names(module.name, ctx.checkpoint.model_type, ("vllm",)):
        asked = name.in_full(module.name)
        if asked and declaration.exclusions.excludes("vllm", asked):
            continue
        yield ctx.finding(
            f"vLLM asks for it as {name.asked}, which no exclusion names"
            if asked
            else "vLLM asks for it without a name, which no exclusion matches",
            cause="name that vLLM asks for",
            where=Where(weight.name, weight.file),
            observed=module.name,
            expected=asked or "MIXED_PRECISION, with an entry for each quantized module",
            severity="warning",
            engines={name.engine: ("error", f"builds a quantized layer ({name.source})")},
        )


def _of_some_engines(ctx: Context, declaration: Declaration, module: Module) -> Effects | None:
    """Return what engines do with a layer that only some of them build as quantized; None where
    all build it alike.
    """
    kind, form = role(module.stem), declaration.form
    if declaration.declared_for(module.name).algo is None:
        return None
    if declaration.exclusions.loose(module.name):
        return None
    if form == "compressed-tensors" and kind == "lm_head":
        return _HEAD
    if form in ("gptq", "awq") and kind in _BLOCK:
        return _FROM_HEADERS
    fp8 = declaration.method in ("fp8", "fbgemm_fp8") and form != "flat"
    routers = ctx.checkpoint.model_type in ROUTERS_BY_CONFIG
    return _BY_CONFIG if fp8 and kind == "router" and routers else None
