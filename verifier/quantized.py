# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with its modules, their formats and its quantization declarations worked out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from verifier.checkpoint import Checkpoint, Tensor
from verifier.decoding import Float32, decode, widen
from verifier.errors import ContentError
from verifier.layouts.expert_stacks import expanded
from verifier.schemes import (
    CACHE_LEAVES,
    FLOATS,
    KV_LEAVES,
    Declaration,
    Declarations,
    DeclaredFormat,
    Format,
    Module,
    Role,
    Sibling,
    declared_formats,
    fitting,
    gather,
    read_declarations,
    role,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Quantized modules that differ only in name and place: leaves, dtypes, shapes and
    declarations are equal.

    ``format`` is `QuantizedCheckpoint.format_of` of each module. ``declared`` is what the
    declaration says about the first; only its ``entry`` may differ for the others.
    """

    modules: tuple[Module, ...]
    format: Format | None
    declared: DeclaredFormat | None

    @property
    def first(self) -> Module:
        """The first module in file order."""
        return self.modules[0]


class QuantizedCheckpoint:
    """The modules, formats and declarations of one checkpoint, each worked out on first use.

    Nothing here reads tensor bytes, `values` excepted.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def part(self, modules: Iterable[Module]) -> QuantizedCheckpoint:
        """Return a view of some modules: names, shapes, declarations and formats stay those of the
        whole checkpoint.
        """
        return _CheckpointPart(self, modules)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every module by name, in file order."""
        return gather(self.checkpoint.tensors.values(), declared_formats(self.declaration))

    @property
    def tensors(self) -> Iterator[Tensor]:
        """The tensors of the modules, module by module."""
        return (t for m in self.modules.values() for t in m.parts.values())

    @cached_property
    def shapes(self) -> Mapping[str, Shape | None]:
        """The unquantized names that the tensors stand for, with their logical shapes: the last
        dimension of packed values doubled.

        None is the shape of a packed weight that does not have two dimensions.
        """
        return dict(pair for m in self.modules.values() for pair in m.unquantized())

    @cached_property
    def names(self) -> frozenset[str]:
        """The unquantized names that the tensors stand for."""
        return frozenset(self.shapes)

    @cached_property
    def declarations(self) -> Declarations:
        """Both quantization declarations, a stack's entries repeated for each of its experts."""
        declarations = read_declarations(self.checkpoint)
        return Declarations(
            expanded(declarations.inline, self.checkpoint),
            expanded(declarations.file, self.checkpoint),
        )

    @cached_property
    def declaration(self) -> Declaration | None:
        """The declaration that engines act on, or None where its dialect is not supported."""
        effective = self.declarations.effective
        return effective if effective is not None and effective.known else None

    @cached_property
    def tied_heads(self) -> frozenset[str]:
        """The weights of output heads that are stored although every level of config.json that has
        ``tie_word_embeddings`` ties them.
        """
        top = self.checkpoint.config or {}
        text = top.get("text_config")
        levels = (top, text if isinstance(text, Mapping) else {})
        flags = [level.get("tie_word_embeddings") for level in levels]
        stated = [flag for flag in flags if isinstance(flag, bool)]
        if not stated or not all(stated):
            return frozenset()
        return frozenset(
            f"{m}.weight" for m in self.modules if m == "lm_head" or m.endswith(".lm_head")
        )

    def declared_for(self, module: Module) -> DeclaredFormat | None:
        """Return what the declaration says about a module, or None without a declaration."""
        return self.declaration.declared_for(module.name) if self.declaration else None

    def declared_group_size(self, module: Module, fmt: Format) -> int | None:
        """Return the group size that a declaration states for a module where it differs from the
        format's, else the format's.
        """
        for declaration in self._known_declarations:
            declared = declaration.declared_for(module.name)
            if declared.group_size not in (None, fmt.group_size):
                return declared.group_size
        return fmt.group_size

    def format_of(self, module: Module) -> Format | None:
        """Return the format that a quantized module must satisfy (`verifier.schemes.format_of`)."""
        return self._formats[module.name] if module.quantized else None

    def siblings(self, module: Module) -> tuple[tuple[str, Sibling], ...]:
        """Return the leaves of a quantized module that its format has, each with what the format
        requires of the tensor; () where the format is not known.
        """
        fmt = self.format_of(module)
        return _siblings(fmt, module.scales) if fmt is not None else ()

    def stored_format(self, module: Module) -> Format | None:
        """Return the format that a module must satisfy, else the one that its tensors show."""
        return self.format_of(module) or module.inferred_format

    @cached_property
    def quantized_modules(self) -> tuple[Module, ...]:
        """Modules whose weight is stored quantized or that carry scales."""
        return tuple(m for m in self.modules.values() if m.quantized)

    @cached_property
    def formatted(self) -> tuple[tuple[Module, Format], ...]:
        """The quantized modules whose format is known, with that format."""
        pairs = ((m, self._formats[m.name]) for m in self.quantized_modules)
        return tuple((module, fmt) for module, fmt in pairs if fmt is not None)

    @cached_property
    def module_groups(self) -> tuple[ModuleGroup, ...]:
        """The quantized modules, grouped by what headers and declarations say; each is in exactly
        one group.

        A rule that needs neither names nor bytes checks `ModuleGroup.first` and counts the others.
        """
        groups: dict[tuple[object, ...], list[Module]] = {}
        for module in self.quantized_modules:
            key: tuple[object, ...] = (module.signature,)
            for declaration in self._known_declarations:
                key += declaration.declared_for(module.name).kind
            groups.setdefault(key, []).append(module)
        return tuple(self._group(modules) for modules in groups.values())

    def in_file_order(self, groups: Iterable[ModuleGroup]) -> list[Module]:
        """Return the modules of some groups in file order."""
        names = {module.name for group in groups for module in group.modules}
        return [module for module in self.quantized_modules if module.name in names]

    def _group(self, modules: list[Module]) -> ModuleGroup:
        declared = self.declared_for(modules[0])
        return ModuleGroup(tuple(modules), fitting(modules[0], declared), declared)

    @cached_property
    def _formats(self) -> Mapping[str, Format | None]:
        return {m.name: g.format for g in self.module_groups for m in g.modules}

    @cached_property
    def _known_declarations(self) -> list[Declaration]:
        both = (self.declarations.inline, self.declarations.file)
        return [d for d in both if d is not None and d.known]

    @cached_property
    def scales(self) -> tuple[tuple[Module, Format, Sibling, Tensor], ...]:
        """Every scale tensor that a module's format has: module, format, what the format requires
        of the tensor, the tensor.
        """
        return tuple(
            (module, fmt, sibling, module.parts[leaf])
            for module, fmt in self.formatted
            for leaf, sibling in _siblings(fmt, module.scales)
        )

    def scale_tensors(self, leaves: tuple[str, ...]) -> Iterator[tuple[Module, Format, Tensor]]:
        """Yield the scale tensors of some leaves whose dtype is one of the format's."""
        for module, fmt in self.formatted:
            for leaf in leaves:
                tensor, sibling = module.parts.get(leaf), fmt.sibling(leaf)
                if tensor is not None and sibling is not None and tensor.dtype in sibling.dtypes:
                    yield module, fmt, tensor

    def scales_of(self, *roles: Role) -> Iterator[tuple[Module, Format, Sibling, Tensor]]:
        """Yield the siblings of some roles whose dtype is one of the format's, as in `scales`."""
        for entry in self.scales:
            _, _, sibling, tensor = entry
            if sibling.role in roles and tensor.dtype in sibling.dtypes:
                yield entry

    @cached_property
    def cache_scales(self) -> tuple[tuple[Module, str, Tensor], ...]:
        """Every scale and bias of a quantized KV cache or attention: the module that holds it, its
        leaf, the tensor.
        """
        return tuple(
            (m, leaf, m.parts[leaf])
            for m in self.modules.values()
            for leaf in m.parts
            if leaf in CACHE_LEAVES
        )

    @cached_property
    def kv_scales(self) -> tuple[tuple[Module, str, Tensor], ...]:
        """Every scale of the KV cache: the module that holds it, ``k_scale`` or ``v_scale``, the
        tensor.

        ``output_scale`` of a projection is one, too (compressed-tensors before 0.6, Quark).
        """
        found = []
        for module, leaf, tensor in self.cache_scales:
            if leaf in KV_LEAVES:
                found.append((module, leaf, tensor))
            elif leaf == "output_scale" and module.name.endswith((".k_proj", ".v_proj")):
                found.append((module, f"{module.name[-6]}_scale", tensor))
        return tuple(found)

    @cached_property
    def linears(self) -> tuple[Module, ...]:
        """Two-dimensional weights that engines build as linear layers (not embeddings or norms)."""
        return tuple(
            m
            for m in self.modules.values()
            if m.dims is not None
            and m.signature.weight not in (None, "")
            and role(m.stem) not in ("embedding", "norm")
        )

    def values(self, module: Module) -> Float32 | None:
        """Return a weight's values, float32 [out, in], decoded where it is quantized.

        None where they cannot be decoded: the format is not known, or the module's tensors do not
        fit one another, which the shape rules report.
        """
        weight = module.weight
        if weight is None:
            return None
        if not module.quantized:
            return widen(self.checkpoint.array(weight)) if weight.dtype in FLOATS else None
        fmt = self.stored_format(module)
        if fmt is None:
            return None
        try:
            parts = {leaf: self.checkpoint.array(t) for leaf, t in module.parts.items()}
            return decode(parts, fmt)
        except ContentError:
            return None


class _CheckpointPart(QuantizedCheckpoint):
    """Some modules of a checkpoint. What is overridden here is taken from the whole; everything
    else follows from the modules of the part.
    """

    def __init__(self, whole: QuantizedCheckpoint, modules: Iterable[Module]) -> None:
        super().__init__(whole.checkpoint)
        self._whole = whole
        self.modules = {m.name: m for m in modules}

    @cached_property
    def shapes(self) -> Mapping[str, Shape | None]:
        return self._whole.shapes

    @cached_property
    def names(self) -> frozenset[str]:
        return self._whole.names

    @cached_property
    def declarations(self) -> Declarations:
        return self._whole.declarations

    @cached_property
    def declaration(self) -> Declaration | None:
        return self._whole.declaration

    @cached_property
    def _formats(self) -> Mapping[str, Format | None]:
        return self._whole._formats


@lru_cache(maxsize=4096)
def _siblings(fmt: Format, leaves: tuple[str, ...]) -> tuple[tuple[str, Sibling], ...]:
    """Return the leaves that a format has, each with what it requires of the tensor."""
    pairs = ((leaf, fmt.sibling(leaf)) for leaf in leaves)
    return tuple((leaf, sibling) for leaf, sibling in pairs if sibling is not None)


def config_value(config: Mapping[str, Any] | None, *keys: str) -> int | None:
    """Return the first whole number under some keys of a config: in ``text_config`` first, then at
    the top level.
    """
    top = config or {}
    text = top.get("text_config")
    for node in (text if isinstance(text, Mapping) else {}, top):
        for key in keys:
            if type(node.get(key)) is int:
                return int(node[key])
    return None
