# SPDX-License-Identifier: Apache-2.0
"""The key table of one checkpoint: every hub name its family may have, what the framework calls it,
and its format.

Names come from the family data, counts from the config, formats from the declaration; nothing is
guessed from a name that the family does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from exporter.adapters.tables import TABLES, Place, Stack, Table
from verifier.errors import PlanError
from verifier.layouts import family as families
from verifier.layouts.family import Family
from verifier.schemes import FORMATS, Declaration, parse, role

SCALES = FORMATS["mxfp8"].siblings[0].leaves
"""The spellings of an MXFP8 scale's leaf."""
_NEVER = frozenset({"vision", "projector", "router", "norm", "embedding", "lm_head"})
"""Roles that a declaration for the whole checkpoint does not reach, excluded by name or not."""


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor of the hub layout.

    ``spellings``: its hub names, the one that is written first. ``algo``: the algorithm it is
    stored in (``MXFP8``), None for none. ``scale``: the leaf of its scale. ``stack``, ``expert``,
    ``piece``: where it lies in a native stack.
    """

    spellings: tuple[str, ...]
    native: str
    algo: str | None
    scale: str
    stack: Stack | None = None
    expert: int = 0
    piece: int = 0

    @property
    def hub(self) -> str:
        """The hub name that is written."""
        return self.spellings[0]

    @property
    def scale_name(self) -> str:
        """The hub name of its scale."""
        return f"{self.hub.removesuffix('weight')}{self.scale}"


@dataclass(frozen=True)
class Keys:
    """The key table: ``hub`` by every spelling, ``native`` with the keys of each native name,
    ``experts`` of a block.
    """

    hub: Mapping[str, Key]
    native: Mapping[str, tuple[Key, ...]]
    experts: int
    mtp: int | None
    declaration: Declaration | None

    def unknown(self, name: str) -> str:
        """Return why a hub name is not in the table."""
        if role(name) == "mtp" and self.mtp is not None:
            return (
                f"{name}: the config declares {self.mtp} MTP modules, none of which has this tensor"
            )
        return f"{name}: no tensor that this family has under this config; exclude_key_regex= leaves it out"


def build(config: Mapping[str, Any], table: Table | None, names: Iterable[str] | None) -> Keys:
    """Return the key table of a config.

    Args:
        config: the parsed config.json.
        table: the names of the framework; by default that of the config's ``model_type``.
        names: the tensors on disk, where known: they decide spellings and what is quantized.

    Raises:
        PlanError: no table or family for the model type, a hub name that no rule or more than one
            claims, two hub names with one native name.
    """
    return _Builder(
        config, _table(config, table), None if names is None else frozenset(names)
    ).build()


def _table(config: Mapping[str, Any], table: Table | None) -> Table:
    if table is not None:
        return table
    found = TABLES.get(str(config.get("model_type")))
    if found is None:
        known = ", ".join(sorted(TABLES))
        raise PlanError(
            f"model_type {config.get('model_type')!r}: no table of native names (known: {known}); give table="
        )
    return found


class _Builder:
    def __init__(
        self, config: Mapping[str, Any], table: Table, names: frozenset[str] | None
    ) -> None:
        family = families.load(table.family)
        if family is None:
            raise PlanError(
                f"no layout of the family {table.family!r}; known: {', '.join(families.known())}"
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
        # A pattern without wildcards excludes what it is a run of dot parts of (lm_head,
        # model.embed_tokens).
        plain = [re.escape(p) for p in (self.declaration.exclude if self.declaration else ()) if p]
        self.runs = re.compile(rf"(?:^|\.)(?:{'|'.join(plain)})(?:\.|$)" if plain else r"(?!)")
        self.hub: dict[str, Key] = {}
        self.native: dict[str, list[Key]] = {}

    def build(self) -> Keys:
        tails: dict[str, int | None] = {}
        for full, shape in self.family.expected(self.config).items():
            if not full.startswith(self.table.strip):
                continue
            name = full.removeprefix(self.table.strip)
            place, numbers, tail = self._place(name)
            rank = None if shape is None else len(shape)
            if place.block:
                tails[tail] = rank
                self._inside(place, numbers, "", tail, rank)
            else:
                self._add(place, numbers, tail, place.native.format(**numbers) + tail, rank)
        modules = self._mtp(tails)
        for native, keys in self.native.items():
            keys.sort(key=lambda k: (k.expert, k.piece))
            self._once(native, keys)
        experts = self.family.experts(self.config) or 0
        return Keys(
            self.hub,
            {n: tuple(k) for n, k in self.native.items()},
            experts,
            modules,
            self.declaration,
        )

    def _place(self, name: str) -> tuple[Place, dict[str, str], str]:
        """Return the one place whose prefix a name has, the numbers in it, and the rest."""
        found = [(p, m) for p in self.table.places for h in p.hub if (m := _pattern(h).match(name))]
        if not found:
            raise PlanError(f"{name}: no rule of the table for {self.table.family} names it")
        if len(found) > 1:
            rules = " and ".join(repr(p.hub[0]) for p, _ in found)
            raise PlanError(
                f"{name}: two rules of the table for {self.table.family} claim it, {rules}"
            )
        place, match = found[0]
        return place, match.groupdict(), name[match.end() :]

    def _inside(
        self, place: Place, numbers: dict[str, str], block: str, tail: str, rank: int | None
    ) -> None:
        """Add a tensor of a decoder block; ``block`` stands between the place's prefix and the
        block's own names.
        """
        table = self.table
        moved = [(a, b) for a, b in table.inside.items() if tail.startswith(a)]
        stacked = [
            (s, i, m)
            for s in table.stacks
            for i, h in enumerate(s.hub)
            if (m := _pattern(h).fullmatch(tail))
        ]
        if len(moved) + len(stacked) > 1:
            rules = " and ".join(
                repr(r) for r in [a for a, _ in moved] + [s.hub[i] for s, i, _ in stacked]
            )
            name = place.hub[0].format(**numbers) + block + tail
            raise PlanError(f"{name}: two rules of the table for {table.family} claim it, {rules}")
        head = place.native.format(**numbers) + block
        if stacked:
            stack, piece, match = stacked[0]
            self._add(
                place,
                numbers,
                block + tail,
                head + stack.native,
                rank,
                (stack, int(match["expert"]), piece),
            )
        else:
            new = moved[0][1] + tail.removeprefix(moved[0][0]) if moved else tail
            self._add(place, numbers, block + tail, head + new, rank)

    def _mtp(self, tails: Mapping[str, int | None]) -> int | None:
        """Add what MTP modules may have: any tensor of any decoder block, and their own."""
        mtp = self.table.mtp
        if mtp is None:
            return None
        count = next(
            (c for c in (self.family.value(self.config, p) for p in mtp.count) if c is not None), 0
        )
        if count * max(1, len(tails)) > families.MAX_TENSORS:
            raise PlanError(f"config.json declares {count:,} MTP modules")
        for i in range(count):
            numbers = {"n": str(i)}
            for tail, rank in tails.items():
                self._inside(mtp.place, numbers, mtp.block, tail, rank)
            for tail, dims in mtp.extra.items():
                self._add(
                    mtp.place, numbers, tail, mtp.place.native.format(**numbers) + tail, len(dims)
                )
        return count

    def _add(
        self,
        place: Place,
        numbers: dict[str, str],
        tail: str,
        native: str,
        rank: int | None,
        where: tuple[Stack, int, int] | None = None,
    ) -> None:
        spellings = [h.format(**numbers) + tail for h in place.hub]
        if self.names is not None:
            spellings.sort(key=lambda s: s not in self.names)  # type: ignore[operator]
        algo, scale = self._format(place, spellings, tail, rank)
        key = Key(tuple(spellings), native, algo, scale, *(where or (None, 0, 0)))
        for name in spellings:
            if name in self.hub:
                raise PlanError(f"{name}: two rules of the table for {self.table.family} claim it")
            self.hub[name] = key
        self.native.setdefault(native, []).append(key)

    def _once(self, native: str, keys: list[Key]) -> None:
        spots = [(k.stack is None, k.expert, k.piece) for k in keys]
        if len(set(spots)) < len(spots) or len({k.stack for k in keys}) > 1:
            raise PlanError(f"{keys[0].hub} and {keys[1].hub} would both be {native}")

    def _format(
        self, place: Place, spellings: list[str], tail: str, rank: int | None
    ) -> tuple[str | None, str]:
        """Return a tensor's algorithm and its scale's leaf: what is on disk where that is known,
        else what is declared.
        """
        if not spellings[0].endswith(".weight") or rank not in (2, None):
            return None, self.scale
        modules = [s.removesuffix(".weight") for s in spellings]
        if self.table.strip:
            modules = [self.table.strip + m for m in modules] + modules
        if self.names is not None:
            head = spellings[0].removesuffix("weight")
            on_disk = [leaf for leaf in SCALES if head + leaf in self.names]
            shown = "NVFP4" if f"{head}weight_scale_2" in self.names else "MXFP8"
            return (
                (self._declared(modules, tail) or shown, on_disk[0])
                if on_disk
                else (None, self.scale)
            )
        return self._declared(modules, tail), self.scale

    def _declared(self, modules: list[str], tail: str) -> str | None:
        declared = self.declaration
        if declared is None or not declared.modelopt:
            return None
        covers = [declared.declared_for(m) for m in modules]
        if declared.mixed:
            return next((c.algo for c in covers if c.algo is not None), None)
        # An MTP module's own names say nothing but "mtp": what it is shows from its place in a
        # decoder block.
        inner = tail.removeprefix(self.table.mtp.block) if self.table.mtp else tail
        if (
            role(f"model.layers.0.{inner}".removesuffix(".weight")) in _NEVER
            or role(modules[0]) in _NEVER
        ):
            return None
        if any(c.algo is None for c in covers) or any(self.runs.search(m) for m in modules):
            return None
        return declared.algo


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of a template, each ``{x}`` a group of digits."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))
