# SPDX-License-Identifier: Apache-2.0
"""The key table of one checkpoint: every hub name its family may have, its native name, and its
format.

Names come from the family data, counts from the config, formats from the declaration; a name that
the family does not know is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from exporter.adapters.tables import TABLES, NativePrefix, NativeStack, Table
from verifier.errors import PlanError
from verifier.layouts import family as families
from verifier.layouts.family import Family
from verifier.schemes import FORMATS, Declaration, parse, role
from verifier.text import counted

SCALES = FORMATS["mxfp8"].siblings[0].leaves
"""The spellings of an MXFP8 scale's leaf."""
_NEVER = frozenset({"vision", "projector", "router", "norm", "embedding", "lm_head"})
"""Roles that a declaration for the whole checkpoint never covers, excluded by name or not."""


@dataclass(frozen=True, slots=True)
class StackPart:
    """The part of a native stack that a hub tensor is: projection ``index`` of one expert."""

    stack: NativeStack
    expert: int
    index: int


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor of the hub layout.

    Attributes:
        spellings: its hub names, the one that is written first.
        native: what the framework calls it, or the stack that it is a part of.
        algo: the algorithm it is stored in (``MXFP8``), None for unquantized.
        scale: the leaf of its scale.
        part: which part of a native stack it is, None for a tensor of its own.
    """

    spellings: tuple[str, ...]
    native: str
    algo: str | None
    scale: str
    part: StackPart | None = None

    @property
    def hub(self) -> str:
        """The hub name that is written."""
        return self.spellings[0]

    @property
    def scale_name(self) -> str:
        """The hub name of its scale."""
        return f"{self.hub.removesuffix('weight')}{self.scale}"

    @property
    def order(self) -> tuple[int, int]:
        """Its place in the stack: expert, then projection."""
        return (self.part.expert, self.part.index) if self.part is not None else (0, 0)


@dataclass(frozen=True)
class Keys:
    """The key table: keys by every hub spelling and by native name, the experts of a block, the
    declared MTP modules.
    """

    hub: Mapping[str, Key]
    native: Mapping[str, tuple[Key, ...]]
    experts: int
    mtp: int | None
    declaration: Declaration | None

    def unknown(self, name: str) -> str:
        """Return why a hub name is not in the table."""
        if role(name) == "mtp" and self.mtp is not None:
            modules = counted(self.mtp, "MTP module")
            return f"{name}: the config declares {modules}, none of which has this tensor"
        return (
            f"{name}: the family has no such tensor under this config; exclude_key_regex= leaves "
            "it out"
        )


def build(config: Mapping[str, Any], table: Table | None, names: Iterable[str] | None) -> Keys:
    """Return the key table of a config.

    Args:
        config: the parsed config.json.
        table: the names of the framework; by default that of the config's ``model_type``.
        names: the tensors on disk, where known: they decide spellings and what is quantized.

    Raises:
        PlanError: no table or family for the model type, a hub name that no rule or more than one
            matches, two hub names with one native name.
    """
    on_disk = None if names is None else frozenset(names)
    return _Builder(config, _table(config, table), on_disk).build()


def _table(config: Mapping[str, Any], table: Table | None) -> Table:
    if table is not None:
        return table
    model_type = str(config.get("model_type"))
    if model_type not in TABLES:
        raise PlanError(
            f"no table of native names for model_type {model_type} (known: "
            f"{', '.join(sorted(TABLES))}); pass table="
        )
    return TABLES[model_type]


class _Builder:
    """Applies the rules of a table to every tensor of its family."""

    def __init__(
        self, config: Mapping[str, Any], table: Table, names: frozenset[str] | None
    ) -> None:
        family = families.load(table.family)
        if family is None:
            raise PlanError(
                f"no layout of the family {table.family} (known: {', '.join(families.known())})"
            )
        self.family: Family = family
        self.table, self.names = table, names
        self.config = {table.nest: config} if table.nest else config
        raw = config.get("quantization_config")
        if raw is None and isinstance(config.get("text_config"), Mapping):
            raw = config["text_config"].get("quantization_config")
        self.declaration = parse(raw, "config.json") if raw is not None else None
        vendor = self.declaration is not None and self.declaration.form == "vendor"
        self.scale = table.scale or ("weight_scale_inv" if vendor else "weight_scale")
        # A pattern without wildcards excludes modules with that run of name parts (lm_head,
        # model.embed_tokens).
        plain = [re.escape(p) for p in (self.declaration.exclude if self.declaration else ()) if p]
        self.excluded_runs = re.compile(
            rf"(?:^|\.)(?:{'|'.join(plain)})(?:\.|$)" if plain else r"(?!)"
        )
        self.hub: dict[str, Key] = {}
        self.native: dict[str, list[Key]] = {}

    def build(self) -> Keys:
        """Return the table."""
        block_tails: dict[str, int | None] = {}
        for full_name, shape in self.family.expected(self.config).items():
            if not full_name.startswith(self.table.strip):
                continue
            name = full_name.removeprefix(self.table.strip)
            place, numbers, tail = self._place(name)
            rank = None if shape is None else len(shape)
            if place.block:
                block_tails[tail] = rank
                self._add_in_block(_Tensor(place, numbers, tail, rank))
            else:
                native = place.native.format(**numbers) + tail
                self._add(_Tensor(place, numbers, tail, rank), native)
        mtp = self._add_mtp(block_tails)
        for native, keys in self.native.items():
            keys.sort(key=lambda k: k.order)
            self._require_one_to_one(native, keys)
        native_keys = {name: tuple(keys) for name, keys in self.native.items()}
        experts = self.family.experts(self.config) or 0
        return Keys(self.hub, native_keys, experts, mtp, self.declaration)

    def _place(self, name: str) -> tuple[NativePrefix, dict[str, str], str]:
        """Return the one place whose prefix a name has, the numbers in it, and the rest."""
        matches = []
        for place in self.table.places:
            for prefix in place.hub:
                match = _pattern(prefix).match(name)
                if match is not None:
                    matches.append((place, match))
        if not matches:
            raise PlanError(f"{name}: no rule of the table for {self.table.family} matches it")
        if len(matches) > 1:
            raise self._ambiguous(name, [place.hub[0] for place, _ in matches])
        place, match = matches[0]
        return place, match.groupdict(), name[match.end() :]

    def _ambiguous(self, name: str, rules: Iterable[str] = ()) -> PlanError:
        listed = " and ".join(f'"{rule}"' for rule in rules)
        return PlanError(
            f"{name}: two rules of the table for {self.table.family} match it"
            + (f", {listed}" if listed else "")
        )

    def _add_in_block(self, tensor: _Tensor) -> None:
        """Add a tensor of a decoder block: renamed, part of a stack, or under its own name."""
        renamed = [a for a in self.table.inside if tensor.tail.startswith(a)]
        parts = self._stack_parts(tensor.tail)
        if len(renamed) + len(parts) > 1:
            rules = [*renamed, *(part.stack.hub[part.index] for part in parts)]
            raise self._ambiguous(tensor.spellings[0], rules)
        head = tensor.place.native.format(**tensor.numbers) + tensor.block
        if parts:
            self._add(tensor, head + parts[0].stack.native, parts[0])
        elif renamed:
            rest = tensor.tail.removeprefix(renamed[0])
            self._add(tensor, head + self.table.inside[renamed[0]] + rest)
        else:
            self._add(tensor, head + tensor.tail)

    def _stack_parts(self, tail: str) -> list[StackPart]:
        parts = []
        for stack in self.table.stacks:
            for index, template in enumerate(stack.hub):
                match = _pattern(template).fullmatch(tail)
                if match is not None:
                    parts.append(StackPart(stack, int(match["expert"]), index))
        return parts

    def _add_mtp(self, block_tails: Mapping[str, int | None]) -> int | None:
        """Add what MTP modules may have: any tensor of any decoder block, and their own tensors.

        Returns the number of modules, None where the table has no rule for them.
        """
        mtp = self.table.mtp
        if mtp is None:
            return None
        counts = (self.family.value(self.config, path) for path in mtp.count)
        count = next((c for c in counts if c is not None), 0)
        if count * max(1, len(block_tails)) > families.MAX_TENSORS:
            raise PlanError(f"config.json declares {count:,} MTP modules")
        for number in range(count):
            numbers = {"n": str(number)}
            for tail, rank in block_tails.items():
                self._add_in_block(_Tensor(mtp.place, numbers, tail, rank, mtp.block))
            for tail, dims in mtp.extra.items():
                native = mtp.place.native.format(**numbers) + tail
                self._add(_Tensor(mtp.place, numbers, tail, len(dims)), native)
        return count

    def _add(self, tensor: _Tensor, native: str, part: StackPart | None = None) -> None:
        spellings = tensor.spellings
        if self.names is not None:
            on_disk = self.names
            spellings.sort(key=lambda spelling: spelling not in on_disk)
        algo, scale = self._format(tensor, spellings)
        key = Key(tuple(spellings), native, algo, scale, part)
        for name in spellings:
            if name in self.hub:
                raise self._ambiguous(name)
            self.hub[name] = key
        self.native.setdefault(native, []).append(key)

    @staticmethod
    def _require_one_to_one(native: str, keys: list[Key]) -> None:
        stacks = {k.part.stack if k.part is not None else None for k in keys}
        places = {(k.part is None, *k.order) for k in keys}
        if len(places) < len(keys) or len(stacks) > 1:
            raise PlanError(f"{keys[0].hub} and {keys[1].hub} would both be {native}")

    def _format(self, tensor: _Tensor, spellings: list[str]) -> tuple[str | None, str]:
        """Return a tensor's algorithm and its scale's leaf: what is on disk where that is known,
        else what is declared.
        """
        if not spellings[0].endswith(".weight") or tensor.rank not in (2, None):
            return None, self.scale
        modules = [s.removesuffix(".weight") for s in spellings]
        if self.table.strip:
            modules = [self.table.strip + m for m in modules] + modules
        declared = self._declared(modules, tensor.block + tensor.tail)
        if self.names is None:
            return declared, self.scale
        head = spellings[0].removesuffix("weight")
        scales = [leaf for leaf in SCALES if head + leaf in self.names]
        if not scales:
            return None, self.scale
        inferred = "NVFP4" if f"{head}weight_scale_2" in self.names else "MXFP8"
        return declared or inferred, scales[0]

    def _declared(self, modules: list[str], tail: str) -> str | None:
        """Return the algorithm that the declaration gives a module, by any of its names."""
        declaration = self.declaration
        if declaration is None or not declaration.modelopt:
            return None
        formats = [declaration.declared_for(m) for m in modules]
        if declaration.mixed:
            return next((f.algo for f in formats if f.algo is not None), None)
        # The role of an MTP module's tensor is that of its place in a decoder block.
        inner = tail.removeprefix(self.table.mtp.block) if self.table.mtp else tail
        in_block = role(f"model.layers.0.{inner}".removesuffix(".weight"))
        if in_block in _NEVER or role(modules[0]) in _NEVER:
            return None
        if any(f.algo is None for f in formats):
            return None
        if any(self.excluded_runs.search(m) for m in modules):
            return None
        return declaration.algo


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the hub layout: its place, the numbers in the prefix, the rest of its name, its
    rank where known; ``block`` is what an MTP module has between the two.
    """

    place: NativePrefix
    numbers: dict[str, str]
    tail: str
    rank: int | None
    block: str = ""

    @property
    def spellings(self) -> list[str]:
        """Its hub names."""
        return [prefix.format(**self.numbers) + self.block + self.tail for prefix in self.place.hub]


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of a template, each ``{x}`` a group of digits."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))
