# SPDX-License-Identifier: Apache-2.0
"""What every rule is given: the checkpoint, what it is judged against, and a tally of what was examined."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Bytes, Checkpoint, Tensor
from verifier.decoding import Float32, decode, widen
from verifier.errors import ContentError
from verifier.families import Family, family_of
from verifier.findings import Effect, Finding, Severity, Where
from verifier.rules.naming import Naming, classify, unwrapped
from verifier.schemes import (
    FLOATS,
    FORMATS,
    Cover,
    Declaration,
    Declarations,
    Exclusions,
    Format,
    Module,
    Sibling,
    canonical,
    collapse,
    format_of,
    gather,
    layer_of,
    read_declarations,
    role,
    split,
)

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """How much a rule had to examine (``of``), how much it did (``checked``), and why not the rest."""

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


class Judged:
    """A checkpoint with its modules, family and declarations worked out."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module by name."""
        return gather(self.checkpoint.tensors.values())

    @cached_property
    def names(self) -> frozenset[str]:
        """The unquantized names that the tensors stand for."""
        return frozenset(c for c in map(canonical, self.checkpoint.tensors) if c is not None)

    @cached_property
    def declarations(self) -> Declarations:
        """Both quantization declarations."""
        return read_declarations(self.checkpoint)

    @cached_property
    def declaration(self) -> Declaration | None:
        """The declaration that engines act on, where it is in a dialect that is judged."""
        found = self.declarations.effective
        return found if found is not None and found.known else None

    @cached_property
    def tied_heads(self) -> frozenset[str]:
        """The weights of output heads that are stored although every level of config.json that speaks of it ties them."""
        top = self.checkpoint.config or {}
        text = top.get("text_config")
        said = [c.get("tie_word_embeddings") for c in (top, text if isinstance(text, Mapping) else {})]
        flags = [f for f in said if isinstance(f, bool)]
        if not flags or not all(flags):
            return frozenset()
        return frozenset(f"{m}.weight" for m in self.modules if m == "lm_head" or m.endswith(".lm_head"))

    def cover(self, module: Module) -> Cover | None:
        """Return what the declaration says about a module, or None without a declaration."""
        return self.declaration.cover(module.name) if self.declaration else None

    def format_of(self, module: Module) -> Format | None:
        """Return the format that a quantized module must satisfy (`verifier.schemes.format_of`)."""
        return format_of(module, self.declaration)

    def values(self, module: Module) -> Float32 | None:
        """Return a weight's values in float32, decoded where it is quantized; None where it cannot be."""
        weight = module.weight
        if weight is None:
            return None
        if not module.quantized:
            return widen(self.checkpoint.array(weight)) if weight.dtype in FLOATS else None
        found = self.format_of(module) or module.shown
        if found is None:
            return None
        try:
            return decode({leaf: self.checkpoint.array(t) for leaf, t in module.parts.items()}, found.name)
        except ContentError:
            return None  # its parts do not fit one another: the shape rules name that


class Context(Judged):
    """The candidate, with its base and the checkpoint whose bytes it keeps.

    ``tp`` and ``ep`` are the tensor and expert parallel sizes that it is to be served with, None where nobody says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: Checkpoint | None = None,
        merged_from: Checkpoint | None = None,
        *,
        tp: int | None = None,
        ep: int | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.base = Judged(base) if base else None
        self.merged_from = Judged(merged_from) if merged_from else None
        self.tp, self.ep = tp, ep
        self.tally = Tally()
        self.rule_id = ""
        self.rule_severity: Severity = "error"
        self._extremes: dict[str, tuple[int, int]] = {}
        self._once: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` gives, made once for each key; for small results that several rules need."""
        if key not in self._once:
            self._once[key] = make()
        found: T = self._once[key]
        return found

    @cached_property
    def family(self) -> Family | None:
        """The family that config.json names, where its layout is known."""
        return family_of(self.checkpoint.config)

    @cached_property
    def _layout(self) -> tuple[dict[str, Shape | None], str]:
        if self.family is None or self.checkpoint.config is None:
            return {}, f"the family {self.checkpoint.model_type!r} is not known and there is no base"
        try:
            return self.family.expected(self.checkpoint.config), ""
        except ContentError as error:
            return {}, str(error)

    @cached_property
    def expected(self) -> dict[str, Shape | None]:
        """Every unquantized name that belongs here, with its logical shape where known: the family's, and the base's."""
        found = dict(self._layout[0])
        if self.base:
            names = self.base.names
            found = {n: s for n, s in found.items() if n in names}
            for name in names:
                if found.get(name) is None:
                    found[name] = logical_shape(self.base, name)
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
        return classify(self.names, set(self.expected), allowed, self.checkpoint.tensors, self.family, self.is_mtp)

    @cached_property
    def layers(self) -> int | None:
        """The number of text layers by the base's config, or without a base by the candidate's; None where unknown."""
        return config_value((self.base or self).checkpoint.config, "num_hidden_layers")

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor or module belongs to an MTP module: by its name, or a layer behind the last text layer."""
        what = role(split(name)[0])
        if what == "mtp" or self.layers is None:
            return what == "mtp"
        layer = layer_of(name)
        return layer is not None and layer >= self.layers and what not in ("vision", "projector")

    @cached_property
    def wrapped_exclusions(self) -> dict[str, str]:
        """Dead exclusions that match a module once the part of a wrapper is taken out of them, with what is left."""
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
        if known * 10 < len(self.base.names) or (len(types) > 1 and known * 2 < len(self.base.names)):
            return f"{known} of {len(self.base.names)} names are those of the base"
        differing = [
            n for n in sorted(self.names & self.base.names)
            if (a := logical_shape(self, n)) and (b := logical_shape(self.base, n)) and a != b
        ]  # fmt: skip
        if common and len(differing) * 2 > common:
            return f"{len(differing)} of {common} common tensors have other shapes than the base's, {differing[0]} first"
        return ""

    @cached_property
    def quantized_modules(self) -> tuple[Module, ...]:
        """Modules whose weight is stored as codes or that carry scales."""
        return tuple(m for m in self.modules.values() if m.quantized)

    @cached_property
    def formatted(self) -> tuple[tuple[Module, Format], ...]:
        """The quantized modules whose format is known, with it."""
        return tuple((m, f) for m in self.quantized_modules if (f := self.format_of(m)) is not None)

    @cached_property
    def scales(self) -> tuple[tuple[Module, Format, Sibling, Tensor], ...]:
        """Every scale tensor that a module's format knows: module, format, what the format says of it, the tensor."""
        known = {(f.name, leaf): s for f in FORMATS.values() for s in f.siblings for leaf in s.leaves}
        return tuple(
            (m, f, sibling, m.parts[leaf]) for m, f in self.formatted for leaf in m.scales
            if (sibling := known.get((f.name, leaf))) is not None
        )  # fmt: skip

    @cached_property
    def kv_scales(self) -> tuple[tuple[Module, str, Tensor], ...]:
        """Every scale of the KV cache: the module that it stands on, its leaf, the tensor."""
        return tuple(
            (m, leaf, m.parts[leaf]) for m in self.modules.values() for leaf in ("k_scale", "v_scale") if leaf in m.parts
        )

    @cached_property
    def linears(self) -> tuple[Module, ...]:
        """Two-dimensional weights that engines build as linear layers (not embeddings or norms)."""
        return tuple(
            m for m in self.modules.values()
            if m.dims is not None and "weight" in m.parts and role(m.name) not in ("embedding", "norm")
        )  # fmt: skip

    def declared_group(self, module: Module, found: Format) -> int | None:
        """Return the group size that a declaration states for a module where it is not the format's, else the format's."""
        for declaration in (self.declarations.inline, self.declarations.file):
            cover = declaration.cover(module.name) if declaration is not None and declaration.known else None
            if cover is not None and cover.group_size not in (None, found.group_size):
                return cover.group_size
        return found.group_size

    @property
    def untouched_source(self) -> Judged:
        """The checkpoint whose bytes are kept: ``--merged-from``, else the base (only where one of both is given)."""
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
            mine, kept = (self.format_of(module) or module.shown), (source.format_of(theirs) or theirs.shown)
            if (module.quantized or theirs.quantized) and (mine is not kept or self.merged_from is None):
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
        """Return a tensor's bytes."""
        return self.checkpoint.read(tensor)

    def extremes(self, tensor: Tensor) -> tuple[int, int]:
        """Return the smallest and largest byte of a tensor; read once, whichever rules ask."""
        found = self._extremes.get(tensor.name)
        if found is None:
            data = self.bytes_of(tensor)
            found = (int(data.min()), int(data.max())) if data.size else (1, 1)
            self._extremes[tensor.name] = found
        return found

    def digest(self, tensor: Tensor) -> bytes:
        """Return a digest of a tensor's bytes; read once, whichever rules ask."""
        return self.once(
            ("digest", tensor.name), lambda: hashlib.blake2b(self.bytes_of(tensor).data, digest_size=16).digest()
        )

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor of the candidate in its own dtype and shape."""
        return self.checkpoint.array(tensor)

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
        """Return a finding of the running rule; ``engines`` as in `verifier.rules.Rule`, for this finding alone."""
        if where is None:
            known = self.checkpoint.tensors.get(tensor) if tensor else None
            where = Where(tensor, known.file if known else None)
        effects = tuple(Effect(engine, *rest) for engine, rest in (engines or {}).items())
        return Finding(
            self.rule_id, severity or self.rule_severity, message, where, str(observed), str(expected), count,
            effects=effects,
        )  # fmt: skip

    def at_byte(self, tensor: Tensor, flat: int) -> Where:
        """Return the place of the byte ``flat`` of a tensor: row, block, offset in its file."""
        itemsize = max(1, tensor.nbytes // max(1, tensor.elements))
        index = np.unravel_index(flat // itemsize, tensor.shape) if tensor.shape else ()
        row = int(index[-2]) if len(index) >= 2 else (int(index[0]) if index else None)
        block = int(index[-1]) if len(index) >= 2 else None
        return Where(tensor.name, tensor.file, row, block, tensor.offset + flat)


def config_value(config: Mapping[str, Any] | None, *keys: str) -> int | None:
    """Return the first whole number that a config states under some keys, in its text part or at the top."""
    top = config or {}
    text = top.get("text_config")
    for node in (text if isinstance(text, Mapping) else {}, top):
        for key in keys:
            if type(node.get(key)) is int:
                return int(node[key])
    return None


def logical_shape(judged: Judged, name: str) -> Shape | None:
    """Return the unquantized shape of a canonical name in a checkpoint, packed widths doubled."""
    module, _, leaf = name.rpartition(".")
    found = judged.modules.get(module) if leaf == "weight" else None
    if found is not None and found.dims is not None and found.weight is not None:
        return found.dims if found.weight.dtype == "U8" and found.quantized else found.weight.shape
    tensor = judged.checkpoint.tensors.get(name)
    return tensor.shape if tensor else None


def stored(parts: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a module's parts."""
    return {leaf: checkpoint.array(t) for leaf, t in parts.items()}
