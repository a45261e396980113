# SPDX-License-Identifier: Apache-2.0
"""What every rule is given: the checkpoint, what it is judged against, and a tally of what was
examined.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Bytes, Checkpoint, Tensor
from verifier.decoding import Float32, decode, widen
from verifier.errors import ContentError
from verifier.evaluation import Evaluation
from verifier.findings import Effect, Finding, Severity, Where
from verifier.layouts.expert_stacks import (
    Unstacked,
    expanded,
    place_in_file,
    split_shapes,
    unstacked,
)
from verifier.layouts.family import Family, family_of
from verifier.layouts.name_differences import Naming, classify, unwrapped
from verifier.rules.loading import Loaded, Loader
from verifier.rules.scan import TensorScan, survey
from verifier.schemes import (
    FLOATS,
    FORMATS,
    KV_LEAVES,
    SCALE_LEAVES,
    Declaration,
    Declarations,
    DeclaredFormat,
    Exclusions,
    Format,
    Module,
    Sibling,
    collapse,
    fitting,
    gather,
    layer_of,
    read_declarations,
    role,
    split,
)

Shape = tuple[int, ...]
T = TypeVar("T")
SMALL = 4096
# What a part of the modules takes over from the whole; all else that is worked out once follows
# from its own modules.
_WHOLE = frozenset(
    {
        "shapes",
        "names",
        "declarations",
        "declaration",
        "family",
        "_layout",
        "expected",
        "naming",
        "unrelated_base",
        "_formats",
        "partners",
    }
)
_DECODED = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "scales",
)


@dataclass(slots=True)
class Tally:
    """How much a rule had to examine (``of``), how much it did (``checked``), and why not the
    rest.
    """

    checked: int = 0
    of: int = 0
    reason: str = ""

    def see(self, count: int = 1) -> None:
        """Count units that the checkpoint has and that were examined."""
        self.checked += count
        self.of += count

    def miss(self, count: int, reason: str) -> None:
        """Count units that the checkpoint has and that could not be judged."""
        self.of += count
        if count:
            self.reason = reason


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Quantized modules that differ in name and place only: leaves, dtypes, shapes and declarations
    are the same.

    ``format`` is `QuantizedCheckpoint.format_of` each; ``cover`` that of the first (``entry`` aside, that of
    each).
    """

    modules: tuple[Module, ...]
    format: Format | None
    cover: DeclaredFormat | None

    @property
    def first(self) -> Module:
        """The first of them, in file order."""
        return self.modules[0]


class QuantizedCheckpoint:
    """A checkpoint with its modules, family and declarations worked out."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module by name."""
        return gather(self.checkpoint.tensors.values())

    @cached_property
    def shapes(self) -> dict[str, Shape | None]:
        """Every unquantized name that the tensors stand for, with its unquantized shape, packed
        widths doubled.

        None is the shape of a packed weight that has other than two dimensions.
        """
        found: dict[str, Shape | None] = {}
        for module in self.modules.values():
            for leaf, tensor in module.parts.items():
                if leaf in SCALE_LEAVES or leaf in KV_LEAVES:
                    continue
                if leaf == "weight" or (leaf == "weight_packed" and "weight" not in module.parts):
                    name = tensor.name if leaf == "weight" else f"{module.name}.weight"
                    found[name] = module.dims or (tensor.shape if leaf == "weight" else None)
                elif leaf == "blocks":
                    name = tensor.name.removesuffix("_blocks")
                    found[name] = module.dims if name.endswith(".weight") else None
                elif leaf != "weight_packed":
                    found[tensor.name] = tensor.shape
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """The unquantized names that the tensors stand for."""
        return frozenset(self.shapes)

    @cached_property
    def declarations(self) -> Declarations:
        """Both quantization declarations."""
        found = read_declarations(self.checkpoint)
        return Declarations(
            expanded(found.inline, self.checkpoint), expanded(found.file, self.checkpoint)
        )

    @cached_property
    def declaration(self) -> Declaration | None:
        """The declaration that engines act on, where it is in a dialect that is judged."""
        found = self.declarations.effective
        return found if found is not None and found.known else None

    @cached_property
    def tied_heads(self) -> frozenset[str]:
        """The weights of output heads that are stored although every level of config.json that
        speaks of it ties them.
        """
        top = self.checkpoint.config or {}
        text = top.get("text_config")
        said = [
            c.get("tie_word_embeddings") for c in (top, text if isinstance(text, Mapping) else {})
        ]
        flags = [f for f in said if isinstance(f, bool)]
        if not flags or not all(flags):
            return frozenset()
        return frozenset(
            f"{m}.weight" for m in self.modules if m == "lm_head" or m.endswith(".lm_head")
        )

    def declared_for(self, module: Module) -> DeclaredFormat | None:
        """Return what the declaration says about a module, or None without a declaration."""
        return self.declaration.declared_for(module.name) if self.declaration else None

    def format_of(self, module: Module) -> Format | None:
        """Return the format that a quantized module must satisfy (`verifier.schemes.format_of`)."""
        return self._formats[module.name] if module.quantized else None

    @cached_property
    def quantized_modules(self) -> tuple[Module, ...]:
        """Modules whose weight is stored as codes or that carry scales."""
        return tuple(m for m in self.modules.values() if m.quantized)

    @cached_property
    def alike(self) -> tuple[ModuleGroup, ...]:
        """The quantized modules, gathered by what headers and declarations say; each is in one of
        them.

        A rule whose judgement needs neither names nor bytes judges `ModuleGroup.first` and counts the
        others.
        """
        declarations = [
            d
            for d in (self.declarations.inline, self.declarations.file)
            if d is not None and d.known
        ]
        effective = self.declaration
        groups: dict[tuple[object, ...], list[Module]] = {}
        for module in self.quantized_modules:
            name = module.name
            key: tuple[object, ...] = (module.signature,)
            for declaration in declarations:
                algo, via, _, size = declaration.declared_for(name)
                key += (algo, via, size)
            found = groups.get(key)
            if found is None:
                groups[key] = [module]
            else:
                found.append(module)
        result = []
        for modules in groups.values():
            cover = effective.declared_for(modules[0].name) if effective else None
            result.append(ModuleGroup(tuple(modules), fitting(modules[0], cover), cover))
        return tuple(result)

    @cached_property
    def _formats(self) -> dict[str, Format | None]:
        return {m.name: a.format for a in self.alike for m in a.modules}

    def values(self, module: Module) -> Float32 | None:
        """Return a weight's values in float32, decoded where it is quantized; None where it cannot
        be.
        """
        weight = module.weight
        if weight is None:
            return None
        if not module.quantized:
            return widen(self.checkpoint.array(weight)) if weight.dtype in FLOATS else None
        found = self.format_of(module) or module.inferred_format
        if found is None:
            return None
        try:
            return decode(
                {leaf: self.checkpoint.array(t) for leaf, t in module.parts.items()}, found.name
            )
        except ContentError:
            return None  # its parts do not fit one another: the shape rules name that

    def stored_rows(self, module: Module, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Return what decoding rows ``start`` to ``stop`` of a two-dimensional weight takes, in
        dtypes and shapes on disk.

        ``start`` is a multiple of 128, for the sake of formats with tiles of as many rows.

        Raises:
            ContentError: a scale has neither one value nor one row for each row or tile of rows.
        """
        out = module.dims[0] if module.dims else 0
        found = {}
        for leaf, tensor in module.parts.items():
            if leaf not in _DECODED and leaf != module.signature.weight:
                continue
            if tensor.elements == 1 and leaf in SCALE_LEAVES:
                found[leaf] = self.checkpoint.array(tensor)
                continue
            rows = tensor.shape[0] if tensor.shape else 0
            tile = 1 if rows == out else 128
            if rows not in (out, -(-out // 128)) or tensor.dtype not in NUMPY_DTYPES:
                raise ContentError(f"{tensor.name}: {list(tensor.shape)} does not fit {out} rows")
            size, first, last = tensor.nbytes // max(1, rows), start // tile, -(-stop // tile)
            data = self.checkpoint.read_range(tensor, first * size, (last - first) * size)
            found[leaf] = data.view(NUMPY_DTYPES[tensor.dtype]).reshape(
                last - first, *tensor.shape[1:]
            )
        return found

    def rows(self, module: Module, start: int, stop: int) -> npt.NDArray[Any] | None:
        """Return rows of a two-dimensional weight: the bits of BF16 as uint16, all else decoded or
        widened to float32.

        None where its values cannot be decoded; ``start`` as in `stored_rows`.
        """
        if module.weight is None or (not module.quantized and module.weight.dtype not in FLOATS):
            return None
        found = (self.format_of(module) or module.inferred_format) if module.quantized else None
        if module.quantized and found is None:
            return None
        try:
            parts = self.stored_rows(module, start, stop)
            if found is not None:
                return decode(parts, found.name)
        except ContentError:
            return None  # its parts do not fit one another: the shape rules name that
        stored = parts[module.signature.weight or ""]
        return stored.view(np.uint16) if module.weight.dtype == "BF16" else widen(stored)


class Context(QuantizedCheckpoint):
    """The candidate, with its base and the checkpoint whose bytes it keeps.

    Experts that are stored in stacks are judged one by one, whatever is judged against what
    (`verifier.layouts.expert_stacks`). ``tp`` and ``ep`` are the tensor and expert parallel sizes that it
    is to be served with, None where nobody says. ``loader`` puts a checkpoint into a model, at
    depth load.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: Checkpoint | None = None,
        merged_from: Checkpoint | None = None,
        *,
        tp: int | None = None,
        ep: int | None = None,
        loader: Loader | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        super().__init__(unstacked(checkpoint))
        self.base = QuantizedCheckpoint(unstacked(base)) if base else None
        self.merged_from = QuantizedCheckpoint(unstacked(merged_from)) if merged_from else None
        self.tp, self.ep, self.loader = tp, ep, loader
        self.evaluation = evaluation
        self.tally = Tally()
        self.rule_id = ""
        self.rule_severity: Severity = "error"
        self._once: dict[Hashable, Any] = {}

        self._facts: dict[str, TensorScan] = {}
        self._small: dict[str, Bytes] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` gives, made once for each key; for small results that several rules
        need.
        """
        if key not in self._once:
            self._once[key] = make()
        found: T = self._once[key]
        return found

    def learnt(self) -> dict[Hashable, Any]:
        """Return what `once` holds of single modules and tensors: what a copy of this process may
        tell the others.
        """
        return {key: value for key, value in self._once.items() if isinstance(key, tuple)}

    def learn(self, told: Mapping[Hashable, Any]) -> None:
        """Take over what a copy of this process worked out."""
        self._once.update(told)

    @property
    def loaded(self) -> Loaded:
        """What the loader made of the candidate, and of the base beside it; loaded once."""
        if self.loader is None:
            raise ValueError("a rule of depth load was run without a loader")
        load, base = (
            self.loader,
            self.base.checkpoint if self.base and not self.unrelated_base else None,
        )
        return self.once("loaded", lambda: load(self.checkpoint, base))

    def part(self, modules: Iterable[Module]) -> Context:
        """Return a context of some of the modules only, with a tally of its own.

        Names, declarations and what is judged against stay whole; `modules`, `tensors` and what
        follows from them are those of the part. What tensors tell is not shared with other parts.
        """
        _ = self.expected, self.unrelated_base, self._formats, self.partners
        for other in (self.base, self.merged_from):
            _ = other._formats if other else None
        part = copy.copy(self)
        for name in list(part.__dict__):
            if isinstance(getattr(type(self), name, None), cached_property) and name not in _WHOLE:
                del part.__dict__[name]
        part.__dict__["modules"] = {m.name: m for m in modules}
        part.tally, part._facts = Tally(), {}
        return part

    @property
    def tensors(self) -> Iterator[Tensor]:
        """The tensors of the modules, module by module."""
        return (t for m in self.modules.values() for t in m.parts.values())

    @cached_property
    def partners(self) -> dict[str, Tensor]:
        """The tensors of the source that untouched ones are to equal, by name; what was recast has
        none.
        """
        if self.base is None and self.merged_from is None:
            return {}
        return {a.name: b for a, b in self.untouched() if (a.dtype, a.shape) == (b.dtype, b.shape)}

    @cached_property
    def family(self) -> Family | None:
        """The family that config.json names, where its layout is known."""
        return family_of(self.checkpoint.config)

    @cached_property
    def _layout(self) -> tuple[dict[str, Shape | None], str]:
        if self.family is None or self.checkpoint.config is None:
            return (
                {},
                f"the family {self.checkpoint.model_type!r} is not known and there is no base",
            )
        try:
            return split_shapes(
                self.family.expected(self.checkpoint.config), self.checkpoint.config
            ), ""
        except ContentError as error:
            return {}, str(error)

    @cached_property
    def expected(self) -> dict[str, Shape | None]:
        """Every unquantized name that belongs here, with its logical shape where known: the
        family's, and the base's.
        """
        found = dict(self._layout[0])
        if self.base:
            names = self.base.names
            found = {n: s for n, s in found.items() if n in names}
            for name in names:
                if found.get(name) is None:
                    found[name] = self.base.shapes[name]
        return found

    @property
    def why_not_expected(self) -> str:
        """Why names cannot be judged, or '' where they can."""
        return "" if self.base else self._layout[1]

    @cached_property
    def naming(self) -> Naming:
        """How the names here differ from those expected."""
        allowed = set(self._layout[0])
        if self.base:
            allowed |= self.base.names
        family, config = self.family, self.checkpoint.config
        if family is not None and config is not None:
            allowed |= {n for n in self.names - allowed if family.beyond(config, n)}
            if self._layout[0]:
                allowed |= split_shapes(family.possible(config), config).keys()
        return classify(
            self.names,
            set(self.expected),
            allowed,
            self.checkpoint.tensors,
            self.family,
            self.is_mtp,
        )

    @cached_property
    def layers(self) -> int | None:
        """The number of text layers by the base's config, or without a base by the candidate's;
        None where unknown.
        """
        return config_value((self.base or self).checkpoint.config, "num_hidden_layers")

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor or module belongs to an MTP module: by its name, or a layer behind the
        last text layer.
        """
        what = role(split(name)[0])
        if what == "mtp" or self.layers is None:
            return what == "mtp"
        layer = layer_of(name)
        return layer is not None and layer >= self.layers and what not in ("vision", "projector")

    @cached_property
    def wrapped_exclusions(self) -> dict[str, str]:
        """Dead exclusions that match a module once the part of a wrapper is taken out of them, with
        what is left.
        """
        listed = self.declaration.exclude if self.declaration else ()
        plain = {p: w for p in listed if not p.startswith("re:") and (w := unwrapped(p))}
        if not plain:
            return {}
        names = set(self.modules) | {m.rpartition(".")[0] for m in self.modules}
        dead = set(Exclusions([*plain, *plain.values()]).dead(names))
        return {p: w for p, w in plain.items() if p in dead and w not in dead}

    @cached_property
    def kinds(self) -> dict[str, list[Module]]:
        """The modules by their name with layer and expert numbers replaced, MTP modules apart."""
        found: dict[str, list[Module]] = {}
        for name, module in self.modules.items():
            kind = collapse(name)
            found.setdefault(f"mtp {kind}" if self.is_mtp(name) else kind, []).append(module)
        return found

    @cached_property
    def unrelated_base(self) -> str:
        """A sentence on why the base is another model, or '' where it is not."""
        if self.base is None:
            return ""
        if not self.names or not self.base.names:
            return ""
        common = len(self.names & self.base.names)
        naming = self.naming
        renamed = (naming.prefix, naming.leaf, naming.submodel, naming.wrapped)
        known = common + sum(map(len, renamed)) + sum(n for _, n in naming.fused)
        types = {self.checkpoint.model_type, self.base.checkpoint.model_type}
        if known * 10 < len(self.base.names) or (
            len(types) > 1 and known * 2 < len(self.base.names)
        ):
            return f"{known} of {len(self.base.names)} names are those of the base"
        differing = [
            n
            for n in sorted(self.names & self.base.names)
            if (a := self.shapes[n]) and (b := self.base.shapes[n]) and a != b
        ]
        if common and len(differing) * 2 > common:
            return f"{len(differing)} of {common} common tensors have other shapes than the base's, {differing[0]} first"
        return ""

    @cached_property
    def formatted(self) -> tuple[tuple[Module, Format], ...]:
        """The quantized modules whose format is known, with it."""
        formats = self._formats
        return tuple((m, f) for m in self.quantized_modules if (f := formats[m.name]) is not None)

    @cached_property
    def scales(self) -> tuple[tuple[Module, Format, Sibling, Tensor], ...]:
        """Every scale tensor that a module's format knows: module, format, what the format says of
        it, the tensor.
        """
        known = {
            (f.name, leaf): s for f in FORMATS.values() for s in f.siblings for leaf in s.leaves
        }
        return tuple(
            (m, f, sibling, m.parts[leaf])
            for m, f in self.formatted
            for leaf in m.scales
            if (sibling := known.get((f.name, leaf))) is not None
        )

    @cached_property
    def kv_scales(self) -> tuple[tuple[Module, str, Tensor], ...]:
        """Every scale of the KV cache: the module that it stands on, its leaf, the tensor."""
        return tuple(
            (m, leaf, m.parts[leaf])
            for m in self.modules.values()
            for leaf in ("k_scale", "v_scale")
            if leaf in m.parts
        )

    @cached_property
    def linears(self) -> tuple[Module, ...]:
        """Two-dimensional weights that engines build as linear layers (not embeddings or norms)."""
        return tuple(
            m
            for m in self.modules.values()
            if m.dims is not None
            and "weight" in m.parts
            and role(m.name) not in ("embedding", "norm")
        )

    def declared_group(self, module: Module, found: Format) -> int | None:
        """Return the group size that a declaration states for a module where it is not the
        format's, else the format's.
        """
        for declaration in (self.declarations.inline, self.declarations.file):
            cover = (
                declaration.declared_for(module.name)
                if declaration is not None and declaration.known
                else None
            )
            if cover is not None and cover.group_size not in (None, found.group_size):
                return cover.group_size
        return found.group_size

    @property
    def untouched_source(self) -> QuantizedCheckpoint:
        """The checkpoint whose bytes are kept: ``--merged-from``, else the base (only where one of
        both is given).
        """
        source = self.merged_from or self.base
        if source is None:
            raise ValueError("neither a base nor a merged-from checkpoint")
        return source

    def untouched(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tensor here, tensor of the source) for each that no re-quantization touched."""
        source = self.untouched_source
        for module in self.modules.values():
            theirs = source.modules.get(module.name)
            if theirs is None:
                continue
            mine, kept = (
                (self.format_of(module) or module.inferred_format),
                (source.format_of(theirs) or theirs.inferred_format),
            )
            if (module.quantized or theirs.quantized) and (
                mine is not kept or self.merged_from is None
            ):
                parts = {leaf: t for leaf, t in module.parts.items() if leaf == "bias"}
            else:
                parts = dict(module.parts)
            for leaf, tensor in parts.items():
                if leaf in theirs.parts:
                    yield tensor, theirs.parts[leaf]

    def scale_tensors(self, leaves: tuple[str, ...]) -> Iterator[tuple[Module, Format, Tensor]]:
        """Yield the scale tensors of some leaves whose dtype is the format's."""
        for module, found in self.formatted:
            for leaf in leaves:
                tensor, sibling = module.parts.get(leaf), found.sibling(leaf)
                if tensor is not None and sibling is not None and tensor.dtype in sibling.dtypes:
                    yield module, found, tensor

    def bytes_of(self, tensor: Tensor) -> Bytes:
        """Return a tensor's bytes, all at once; `pieces` is for tensors that may be large."""
        if tensor.nbytes > SMALL:
            return self.checkpoint.read(tensor)
        found = self._small.get(tensor.name)
        if found is None:
            found = self._small[tensor.name] = self.checkpoint.read(tensor)
            found.flags.writeable = False
        return found

    def digest(self, tensor: Tensor) -> bytes:
        """Return a digest of a tensor's bytes; read once, whichever rules ask."""
        return self.once(
            ("digest", tensor.name),
            lambda: hashlib.blake2b(self.bytes_of(tensor).data, digest_size=16).digest(),
        )

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, Bytes]]:
        """Yield (start, bytes) of a tensor, a piece at a time; each overwrites the one before
        it.
        """
        return self.checkpoint.pieces(tensor)

    def facts(self, tensor: Tensor) -> TensorScan:
        """Return what one pass over a tensor's bytes tells; read once, whichever rules ask."""
        found = self._facts.get(tensor.name)
        if found is None:
            partner = self.partners.get(tensor.name)
            theirs = (
                self.untouched_source.checkpoint.pieces(partner) if partner is not None else None
            )
            mine = (
                self.pieces(tensor)
                if tensor.nbytes > SMALL
                else ((0, b) for b in [self.bytes_of(tensor)] if b.size)
            )
            found = self._facts[tensor.name] = survey(tensor.dtype, mine, theirs)
        return found

    def extremes(self, tensor: Tensor) -> tuple[int, int]:
        """Return the smallest and largest byte of a tensor of one-byte values; read once, whichever
        rules ask.
        """
        found = self.facts(tensor)
        return found.low, found.high

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor of the candidate in its own dtype and shape, all at once."""
        dtype = NUMPY_DTYPES.get(tensor.dtype) if tensor.nbytes <= SMALL else None
        return (
            self.checkpoint.array(tensor)
            if dtype is None
            else self.bytes_of(tensor).view(dtype).reshape(tensor.shape)
        )

    def finding(
        self,
        message: str,
        *,
        tensor: str | None = None,
        severity: Severity | None = None,
        where: Where | None = None,
        observed: object = "",
        expected: object = "",
        count: int = 1,
        engines: Mapping[str, tuple[Severity, str]] | None = None,
    ) -> Finding:
        """Return a finding of the running rule; ``engines`` as in `verifier.rules.Rule`, for this
        finding alone.
        """
        if where is None:
            known = self.checkpoint.tensors.get(tensor) if tensor else None
            where = Where(tensor, known.file if known else None)
        stack = (
            self.checkpoint.stacked.get(where.tensor or "")
            if isinstance(self.checkpoint, Unstacked)
            else None
        )
        if stack is not None:
            observed = f"{observed} (stored in {stack})".strip()
        effects = tuple(Effect(engine, *rest) for engine, rest in (engines or {}).items())
        return Finding(
            self.rule_id,
            severity or self.rule_severity,
            message,
            where,
            str(observed),
            str(expected),
            count,
            effects=effects,
        )

    def at_byte(self, tensor: Tensor, flat: int) -> Where:
        """Return the place of the byte ``flat`` of a tensor: row, block, offset in its file."""
        itemsize = max(1, tensor.nbytes // max(1, tensor.elements))
        index = np.unravel_index(flat // itemsize, tensor.shape) if tensor.shape else ()
        row = int(index[-2]) if len(index) >= 2 else (int(index[0]) if index else None)
        block = int(index[-1]) if len(index) >= 2 else None
        start = place_in_file(tensor.offset)
        return Where(
            tensor.name, tensor.file, row, block, start + flat if start is not None else None
        )


def config_value(config: Mapping[str, Any] | None, *keys: str) -> int | None:
    """Return the first whole number that a config states under some keys, in its text part or at
    the top.
    """
    top = config or {}
    text = top.get("text_config")
    for node in (text if isinstance(text, Mapping) else {}, top):
        for key in keys:
            if type(node.get(key)) is int:
                return int(node[key])
    return None


def logical_shape(judged: QuantizedCheckpoint, name: str) -> Shape | None:
    """Return the unquantized shape of a canonical name in a checkpoint, packed widths doubled."""
    return judged.shapes.get(name)


def stored(parts: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a module's parts."""
    return {leaf: checkpoint.array(t) for leaf, t in parts.items()}
