# SPDX-License-Identifier: Apache-2.0
"""What a check leaves unexamined: quantized modules, scale tensors and declarations.

This is next to the verdict because no rule can know it: a rule counts what it examined, and a
tensor that no rule looks for is in no count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from verifier.checkpoint import Tensor
from verifier.findings import Finding
from verifier.quantized import ModuleGroup, QuantizedCheckpoint
from verifier.reconstruction.cause import NO_NUMBERS, UNDECODED
from verifier.rules import Context
from verifier.rules.kept import stored_alike
from verifier.schemes import (
    CACHE_LEAVES,
    FLOATS,
    SIBLING_LEAVES,
    Declaration,
    Format,
    Module,
    Sibling,
    collapse,
)
from verifier.summary import NotChecked, NotCheckedKind

SCALE_RULES = frozenset({"QC501", "QC502", "QC518"})
"""The rules that read every sibling of a weight but scales of activations, module by module."""
INPUT_SCALE_RULES = frozenset({"QC503"})
"""The rules that read every scale of activations, over all modules."""
_SCALE_NAME = re.compile(r"(?:^|_)(?:scales?|scale_inv|scale_\d|absmax|amax|zero_points?|zeros)$")
_IGNORED = frozenset({("w4a16_nvfp4", "input_scale")})
"""Scales, by format, that all engines ignore: QC303 warns of them."""
_DECLARATION_RULES = frozenset({"QC407", "QC408", "QC410", "QC411"})
_NO_READER = "no format has a tensor of this name"
_SETTLE_SCALE = "declare the algorithm that has the tensor, or remove it"
_SETTLE_VALUES = "store it in a dtype that its format has"
_SETTLE_FORMAT = "declare the format of the tensors; docs/formats.md lists those that are read"
_SETTLE_NAMED = "load the checkpoint with the tool that wrote it"
_SETTLE_BASE = "pass a base whose values are finite"
_SETTLE_PARTS = "store the weight's tensors in shapes and dtypes that fit one another"
_SETTLE_DECLARATION = "declare it in a form that docs/formats.md lists"


@dataclass(frozen=True, slots=True)
class Unchecked:
    """Something that was not examined, and where: a tensor's or a module's name, or a file's."""

    place: str
    entry: NotChecked


def totals(entries: Iterable[NotChecked]) -> tuple[NotChecked, ...]:
    """Return one entry for each kind and reason, counts added up, in order of first appearance."""
    first: dict[tuple[str, str], NotChecked] = {}
    for entry in entries:
        known = first.get((entry.kind, entry.why))
        count = entry.count + (known.count if known else 0)
        first[entry.kind, entry.why] = replace(known or entry, count=count)
    return tuple(first.values())


def not_checked(
    ctx: Context, findings: Iterable[Finding], unread: Iterable[Unchecked], *, reads_bytes: bool
) -> tuple[NotChecked, ...]:
    """Return what a check left unexamined.

    Args:
        ctx: of the whole checkpoint.
        findings: of rules of depth header. What an error or an accepted finding names is reported
            there, and left out here.
        unread: the scale tensors whose bytes no rule read.
        reads_bytes: whether the depth reads the bytes of tensors.
    """
    reported = [f for f in findings if f.severity == "error" or f.standing == "known"]
    places = {collapse(f.where.tensor) for f in reported if f.where.tensor}
    files = {f.where.file for f in reported if f.rule in _DECLARATION_RULES}
    declared = [e.entry for e in _declarations(ctx.candidate) if e.place not in files]
    headers = chain(_modules(ctx, reads_bytes=reads_bytes), _foreign_scales(ctx))
    entries = chain(headers, unread, _not_compared(ctx))
    return totals([*declared, *(e.entry for e in entries if collapse(e.place) not in places)])


def _modules(ctx: Context, *, reads_bytes: bool) -> Iterator[Unchecked]:
    """Yield the quantized modules that no format says enough of; those that the base or the
    overlay stores alike are compared with it.
    """
    for group in ctx.candidate.module_groups:
        why, settle = _unknown_format(group, reads_bytes=reads_bytes)
        for module in group.modules if why else ():
            if module.weight is not None and not _is_compared(ctx, module):
                entry = NotChecked("modules", 1, module.name, why, settle)
                yield Unchecked(module.weight.name, entry)


def _unknown_format(group: ModuleGroup, *, reads_bytes: bool) -> tuple[str, str]:
    """Return why no format says what to check of the modules, and what settles it."""
    fmt, shown = group.format, group.first.inferred_format
    named = fmt or shown
    if named is not None and not named.decodes:
        if fmt is None:
            return f"{named.algo} is recognized by name only", _SETTLE_NAMED
        why = f"{named.algo} is recognized by name and shape: its values are not decoded"
        return (why, _SETTLE_NAMED) if reads_bytes else ("", "")
    if fmt is not None:
        return "", ""
    if shown is None:
        return "the tensors are of no known format", _SETTLE_FORMAT
    return f"the tensors are {shown.algo}, which is not the declared format", _SETTLE_FORMAT


def _is_compared(ctx: Context, module: Module) -> bool:
    """Whether another checkpoint stores the module in the same tensors, whose bytes QC605
    compares.
    """
    return any(stored_alike(source, module) for source in (ctx.base, ctx.merged_from))


def _foreign_scales(ctx: Context) -> Iterator[Unchecked]:
    """Yield the scale tensors that no format of their module has, and those without a weight."""
    for group in ctx.candidate.module_groups:
        fmt, first = group.format, group.first
        reasons = {leaf: _why_foreign(fmt, first, leaf) for leaf in first.scales}
        reasons = {leaf: why for leaf, why in reasons.items() if why}
        for module in group.modules if reasons else ():
            if not _is_compared(ctx, module):
                for leaf, why in reasons.items():
                    yield _scale("scales", module.parts[leaf], why)
    for tensor in _named_like_scales(ctx):
        yield _scale("scales", tensor, _NO_READER)


def _why_foreign(fmt: Format | None, module: Module, leaf: str) -> str:
    if fmt is not None:
        known = fmt.sibling(leaf) is not None or (fmt.name, leaf) in _IGNORED
        return "" if known else f"{fmt.algo} has no {leaf}"
    return "" if module.weight is not None else "no weight is stored next to it"


def _named_like_scales(ctx: Context) -> Iterator[Tensor]:
    """Yield tensors next to a quantized weight that are called scales in a way that no format
    calls them, and that neither the family nor the base has.
    """
    modules = ctx.candidate.modules
    for name, module in modules.items():
        tensor = module.parts.get("")
        if tensor is None:
            continue
        parent, _, leaf = name.rpartition(".")
        owner = modules.get(parent)
        if owner is None or not owner.quantized or not _SCALE_NAME.search(leaf):
            continue
        if name not in ctx.expectations.shapes:
            yield tensor


def _not_compared(ctx: Context) -> Iterator[Unchecked]:
    """Yield the quantized weights that the base has and that could not be compared with it."""
    for name, result in ctx.payload.results.named("reconstruction"):
        module = ctx.candidate.modules[name]
        if result.reason in (UNDECODED, NO_NUMBERS) and module.weight is not None:
            settle = _SETTLE_BASE if result.reason == NO_NUMBERS else _SETTLE_PARTS
            entry = NotChecked("weights", 1, module.weight.name, result.reason, settle)
            yield Unchecked(module.weight.name, entry)


def _scale(kind: NotCheckedKind, tensor: Tensor, why: str) -> Unchecked:
    settle = _SETTLE_SCALE if kind == "scales" else _SETTLE_VALUES
    return Unchecked(tensor.name, NotChecked(kind, 1, tensor.name, why, settle))


def _declarations(candidate: QuantizedCheckpoint) -> Iterator[Unchecked]:
    """Yield what was read in a config and not understood."""
    both = (candidate.declarations.inline, candidate.declarations.file)
    for declaration in (d for d in both if d is not None):
        for why in _not_understood(declaration):
            entry = NotChecked("declarations", 1, declaration.file, why, _SETTLE_DECLARATION)
            yield Unchecked(declaration.file, entry)


def _not_understood(declaration: Declaration) -> Iterator[str]:
    if not declaration.known and not declaration.unclear:
        method = declaration.method
        yield f"quant_method {method!r} is not known" if method else "it names no quant_method"
    yield from declaration.unclear


@dataclass(frozen=True, slots=True)
class ReadScales:
    """The scale tensors of some modules, by whether rules read them.

    Attributes:
        nbytes: of those that were read.
        unread: the others.
    """

    nbytes: int = 0
    unread: tuple[Unchecked, ...] = ()

    def scaled(self, scale: Callable[[int], int]) -> ReadScales:
        """Return the scales of the modules that these represent."""
        unread = (
            replace(u, entry=replace(u.entry, count=scale(u.entry.count))) for u in self.unread
        )
        return replace(self, unread=tuple(unread))


def read_scales(
    candidate: QuantizedCheckpoint, examined: Collection[str], *, inputs: bool
) -> ReadScales:
    """Return which scale tensors were read.

    Args:
        candidate: the checkpoint, or some of its modules.
        examined: the names of the tensors that rules read.
        inputs: whether the scales of activations are meant; otherwise all others are.
    """
    nbytes, unread = 0, []
    for tensor, why, is_input in _readable_scales(candidate):
        if is_input != inputs:
            continue
        if tensor.name in examined:
            nbytes += tensor.nbytes
        else:
            unread.append(_scale("values", tensor, why))
    return ReadScales(nbytes, tuple(unread))


def _readable_scales(candidate: QuantizedCheckpoint) -> Iterator[tuple[Tensor, str, bool]]:
    """Yield each scale tensor that rules read in a module of its form: the tensor, why none may
    have, and whether it is one of activations.
    """
    for module in candidate.modules.values():
        fmt = candidate.format_of(module)
        for leaf, tensor in module.parts.items():
            if leaf in CACHE_LEAVES:
                yield tensor, f"{leaf} is stored as {tensor.dtype}", False
            elif leaf in SIBLING_LEAVES and fmt is not None:
                sibling = fmt.sibling(leaf)
                if sibling is not None and _has_rules(sibling, tensor):
                    why = f"{fmt.algo}: {leaf} is stored as {tensor.dtype}"
                    yield tensor, why, sibling.role == "input"


def _has_rules(sibling: Sibling, tensor: Tensor) -> bool:
    """Whether a rule says which values a tensor may have: a tool's own state is not read, and
    whole zero points may have any.
    """
    if sibling.role == "state" or sibling.values_in(tensor.dtype) == "opaque":
        return False
    return sibling.role != "zero_point" or tensor.dtype in FLOATS
