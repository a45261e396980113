# SPDX-License-Identifier: Apache-2.0
"""QC410: quantized_layers does not match the modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from verifier.findings import Finding, Severity, Where
from verifier.layouts.engine_needs import all_asked_names, asked_names
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import (
    ENGINES,
    Declaration,
    Format,
    Module,
    expert_key,
    packed_name,
    same_layout,
)


@rule(
    "QC410",
    "quantized_layers does not match the modules",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("TensorRT-LLM", "vLLM", "SGLang"),
    sources=("kekzl/imp#1385",),
    engines={
        "vllm": (
            "error",
            "builds a linear layer unquantized if its fused group has no entry; the experts of a "
            "layer take their first entry",
        ),
        "trtllm": ("error", "drops the scales of unlisted modules, and activations explode"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """With MIXED_PRECISION, each quantized module has its own entry with the format of its tensors.

    **What it does.** Compares ``quantized_layers`` with the stored modules. A module without an
    entry, an entry with the wrong format and an entry for an unquantized weight are errors. A
    module that is listed only through its parent container or through an engine's fused name, and
    an entry without a module, are warnings.

    **Why it happens.** The list names containers (``…experts``) or fused projections of the
    exporter's in-memory model.

    **Impact.** TensorRT-LLM matches names exactly and drops the scales of unlisted modules, so that
    activations explode. vLLM builds a linear layer unquantized if no projection that it fuses with
    it has an entry, and then stops at the scales. It gives all experts of a layer the format of the
    first entry below them, so that a missing or wrong entry after it has no effect, and an
    entry without a module has none either.

    **Fix.** Write one entry per stored module.
    """
    declaration = ctx.candidate.declaration
    if declaration is None or not declaration.mixed:
        return
    entries = _Entries(declaration, ctx.checkpoint.model_type)
    for group in ctx.candidate.module_groups:
        ctx.tally.see(len(group.modules))
        if any(_check_module(ctx, group.first, entries)):
            for module in group.modules:
                yield from _check_module(ctx, module, entries)
    yield from _check_entries(ctx, declaration)


@dataclass(frozen=True)
class _Entries:
    """The entries of a declaration, as vLLM looks at them.

    Attributes:
        declaration: holds them.
        family: the ``model_type`` of the checkpoint.
    """

    declaration: Declaration
    family: str | None

    def effect_on(self, module: Module) -> dict[str, tuple[Severity, str]] | None:
        """Return what vLLM does with a module whose own entry is missing or wrong, where others
        give it its format.
        """
        key, fmt = expert_key(module.name), module.inferred_format
        if key is not None:
            first = self._first_of_experts.get(key.container)
            if first is None or fmt is None or not same_layout(first, fmt):
                return None
            return {"vllm": ("warning", "gives all experts of a layer the format of the first")}
        packed = packed_name(module.name, self.family)
        if packed is not None and packed in self._packed:
            return {"vllm": ("warning", "takes the format of the other projections of the group")}
        return None

    @cached_property
    def _first_of_experts(self) -> dict[str, Format | None]:
        """The format of the first entry below each container of experts."""
        first: dict[str, Format | None] = {}
        for name in self.declaration.layers:
            if (key := expert_key(name)) is not None and key.container not in first:
                first[key.container] = self.declaration.declared_for(name).format
        return first

    @cached_property
    def _packed(self) -> frozenset[str]:
        """The fused modules of which a projection has an entry."""
        names = (packed_name(name, self.family) for name in self.declaration.layers)
        return frozenset(name for name in names if name is not None)


def _check_module(ctx: Context, module: Module, entries: _Entries) -> Iterator[Finding]:
    """Yield a quantized module without an entry of its own, or with one of the wrong format."""
    declaration = entries.declaration
    tensor = module.weight or next(iter(module.parts.values()))
    where = Where(tensor.name, tensor.file)
    declared, fmt = declaration.declared_for(module.name), module.inferred_format
    if declared.algo is None:
        yield ctx.finding(
            "quantized module without an entry in quantized_layers",
            cause="no entry",
            where=where,
            observed="no entry",
            engines=entries.effect_on(module),
        )
    elif declared.format is not None and fmt is not None and not same_layout(declared.format, fmt):
        yield ctx.finding(
            f"quantized_layers declares {declared.algo}, but the tensors are {fmt.algo}",
            cause="format",
            where=where,
            observed=fmt.algo,
            expected=declared.algo,
            engines=entries.effect_on(module) if expert_key(module.name) else None,
        )
    elif declared.via in ("container", "packed"):
        entry = "its container" if declared.via == "container" else "the engine's fused name"
        effect = "matches names exactly and drops the scales of unlisted modules"
        yield ctx.finding(
            f"listed only through {entry}: TensorRT-LLM matches exactly and drops its scales",
            cause="container",
            where=where,
            observed=declared.entry,
            expected=module.name,
            severity="warning",
            engines={"trtllm": ("error", effect)},
        )
    else:
        yield from _asked_differently(ctx, module, where, declaration)


def _asked_differently(
    ctx: Context, module: Module, where: Where, declaration: Declaration
) -> Iterator[Finding]:
    """Yield a module that vLLM looks up by a name that has no entry."""
    for name in asked_names(module.name, ctx.checkpoint.model_type, ("vllm",)):
        asked = name.in_full(module.name)
        if asked and declaration.declared_for(asked).algo is None:
            yield ctx.finding(
                f"vLLM asks for it as {name.asked}, which has no entry",
                cause="name that vLLM asks for",
                where=where,
                observed=module.name,
                expected=asked,
                severity="warning",
                engines={"vllm": ("error", f"builds an unquantized layer ({name.source})")},
            )


def _check_entries(ctx: Context, declaration: Declaration) -> Iterator[Finding]:
    """Yield the entries of unquantized weights, and those that match no module."""
    modules = ctx.candidate.modules
    unmatched = []
    for name, entry in declaration.layers.items():
        module = modules.get(name)
        if module is None:
            unmatched.append(name)
        elif not module.quantized and module.weight is not None:
            ctx.tally.see()
            dtype = module.weight.dtype
            yield ctx.finding(
                f"quantized_layers declares {entry.algo}, but the weight is {dtype}",
                cause="plain weight",
                tensor=module.weight.name,
                observed=dtype,
                expected=entry.algo,
            )
    if not unmatched:
        return
    family = ctx.checkpoint.model_type
    parents = {m.rpartition(".")[0] for m in modules}
    parents.update(filter(None, map(packed_name, modules)))
    parents |= all_asked_names(modules, family, ENGINES)
    for name in unmatched:
        if name not in parents and not any(p.startswith(f"{name}.") for p in parents):
            ctx.tally.see()
            yield ctx.finding(
                f"quantized_layers names {name!r}, which does not exist",
                cause=f"entry {name}",
                where=Where(None, declaration.file),
                observed=name,
                severity="warning",
            )
