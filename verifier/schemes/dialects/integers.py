# SPDX-License-Identifier: Apache-2.0
"""GPTQ's, AWQ's and AutoRound's configs.

Sources: vLLM 0.32 ``auto_gptq.py``, ``utils/gptq_utils.py``, ``auto_awq.py``,
``inc/config_parser.py``; GPTQModel's ``dynamic``; AutoRound 0.16 ``export``. GPTQ's and AWQ's
readers build as quantized what is stored so (vLLM takes the list from the headers), so a module
that no field excludes may be unquantized; AutoRound's build what the config says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from verifier.schemes.declared import Declaration, DeclaredFormat, Dialect, Inputs, Scheme
from verifier.schemes.dialects.common import (
    PartExclusions,
    group_of,
    integer,
    mapping,
    name_lists,
    pair,
    text,
)
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMATS, Block, Format
from verifier.schemes.patterns import Regex, compile_regex
from verifier.schemes.roles import role

_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""Characters by which AutoRound distinguishes a pattern from a name."""


def _sized(fmt: Format, bits: int | None, group: Any) -> Format:
    size = integer(group)
    block: Block = (1, size) if size and size > 0 else (None if size == -1 else fmt.block)
    return fmt.sized(bits=bits, block=block)


@dataclass(frozen=True)
class Override:
    """A pattern of GPTQModel's ``dynamic``: what it changes, None where it excludes."""

    pattern: str
    changes: Mapping[str, Any] | None

    @cached_property
    def regex(self) -> Regex | None:
        """The pattern without its sign, compiled."""
        return compile_regex(self.pattern.removeprefix("-:").removeprefix("+:"))


class Gptq(Dialect):
    """``dynamic`` patterns, and a list of the modules that are quantized."""

    explicit = False

    def __init__(self, overrides: tuple[Override, ...], listed: tuple[str, ...]) -> None:
        self.overrides, self.listed = overrides, listed

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return the negative patterns of ``dynamic``."""
        return _Negative(o for o in self.overrides if o.changes is None)

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the recipe of the first pattern that matches, or the base's."""
        base = declaration.scheme
        if base is None:
            return DeclaredFormat(None, "unlisted")
        if self.listed and not any(part in module for part in self.listed):
            return DeclaredFormat(None, "unlisted")
        for override in self.overrides:
            if override.regex is None or not override.regex.match(module):
                continue
            if override.changes is None:
                return DeclaredFormat(None, "excluded", override.pattern)
            scheme = _changed(base, override.changes)
            return DeclaredFormat(scheme.algo, "group", override.pattern, scheme.group_size, scheme)
        return DeclaredFormat(base.algo, "implied", "", base.group_size, base)


def _changed(base: Scheme, changes: Mapping[str, Any]) -> Scheme:
    if base.format is None:
        return base
    group = changes.get("group_size", base.group_size)
    fmt = _sized(base.format, integer(changes.get("bits")), group)
    symmetric = changes.get("sym", base.symmetric) is not False
    return replace(base, format=fmt, group_size=group_of(group), symmetric=symmetric)


class _Negative(Exclusions):
    """GPTQModel's negative patterns, matched from the start of a name."""

    def __init__(self, overrides: Iterable[Override]) -> None:
        self._overrides = tuple(overrides)
        super().__init__(o.pattern for o in self._overrides)

    def strict(self, module: str) -> bool:
        """Whether a pattern matches the module."""
        return self.pattern_for(module) is not None

    def loose(self, module: str) -> bool:
        """Whether a pattern matches the module: there is one reading."""
        return self.strict(module)

    def excludes(self, reader: str, module: str) -> bool:
        """Whether an engine excludes a module: they read such patterns alike."""
        return self.strict(module)

    def pattern_for(self, module: str) -> str | None:
        """Return the first pattern that matches the module."""
        matching = (
            o.pattern for o in self._overrides if o.regex is not None and o.regex.match(module)
        )
        return next(matching, None)

    def dead(self, modules: Iterable[str]) -> list[str]:
        """Return the patterns that match none of the modules."""
        names = list(modules)
        return [
            o.pattern
            for o in self._overrides
            if o.regex is None or not any(o.regex.match(n) for n in names)
        ]


def parse_gptq(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise GPTQ's config (AutoGPTQ, GPTQModel, AutoRound's export to GPTQ)."""
    problems: list[str] = []
    unclear: list[str] = []
    bits, group = _bits(body, "bits", unclear), body.get("group_size", 128)
    form = text(body.get("checkpoint_format")) or "gptq"
    if form not in ("gptq", "gptq_v2"):
        unclear.append(f"checkpoint_format {form!r}")
    name = "gptq_v2" if form == "gptq_v2" else "gptq"
    scheme = Scheme(
        name.upper(),
        _sized(FORMATS[name], bits, group) if form in ("gptq", "gptq_v2") else None,
        "none",
        body.get("sym", True) is not False,
        group_of(group),
        "scales",
        reordered=body.get("desc_act") is True and group_of(group) is not None,
    )
    overrides = tuple(_overrides(body.get("dynamic"), unclear))
    listed = tuple(_flat(body.get("modules_in_block_to_quantize")))
    return Declaration(
        file,
        "gptq",
        "gptq",
        scheme.algo,
        scheme.group_size,
        tuple(o.pattern for o in overrides if o.changes is None),
        problems=tuple(problems),
        scheme=scheme,
        dialect=Gptq(overrides, listed),
        unclear=tuple(unclear),
    )


def _bits(body: Mapping[str, Any], key: str, unclear: list[str]) -> int | None:
    bits = integer(body.get(key))
    if bits is None or not 1 <= bits <= 16:
        unclear.append(f"{key} is {str(body.get(key))[:40]!r}")
        return None
    return bits


def _overrides(raw: Any, unclear: list[str]) -> Iterator[Override]:
    for pattern, changes in mapping(raw).items():
        negative = pattern.startswith("-:")
        override = Override(pattern, None if negative else mapping(changes))
        if override.regex is None:
            unclear.append(f"dynamic holds {pattern!r}, which does not compile")
        yield override


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from (
                _flat(each)
                if isinstance(each, str)
                else (e for e in (each if isinstance(each, list) else ()) if isinstance(e, str))
            )


class Awq(Dialect):
    """Parts of names that are not converted."""

    explicit = False

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return ``modules_to_not_convert``, which vLLM matches as parts of names."""
        return PartExclusions(patterns)

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the one recipe for what is not excluded."""
        found = super().cover(declaration, module)
        return found if found.algo is None else found._replace(via="implied")


def parse_awq(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise AWQ's config (AutoAWQ, GPTQModel, AutoRound's export to AWQ)."""
    problems: list[str] = []
    unclear: list[str] = []
    bits = _bits(body, "w_bit" if "w_bit" in body else "bits", unclear)
    group = body.get("q_group_size", body.get("group_size", 128))
    version = text(body.get("version")).lower() or "gemm"
    if version != "gemm":
        unclear.append(f"version {version!r} has a layout that is not supported")
    scheme = Scheme(
        "AWQ",
        _sized(FORMATS["awq"], bits, group) if version == "gemm" else None,
        "none",
        group_size=group_of(group),
        scale_leaf="scales",
    )
    return Declaration(
        file,
        "awq",
        "awq",
        "AWQ",
        scheme.group_size,
        name_lists(body, ("modules_to_not_convert",), problems),
        problems=tuple(problems),
        scheme=scheme,
        dialect=AWQ,
        unclear=tuple(unclear),
    )


@dataclass(frozen=True)
class Extra:
    """An entry of AutoRound's ``extra_config``: a name, or a pattern."""

    key: str
    changes: Mapping[str, Any]

    @cached_property
    def regex(self) -> Regex | None:
        """The key as a pattern; None where it is a name, or does not compile."""
        return compile_regex(f".*(?:{self.key})") if _SPECIAL & set(self.key) else None


class AutoRound(Dialect):
    """What is under ``block_name_to_quantize``, with exceptions by name or pattern."""

    def __init__(self, blocks: tuple[str, ...], extras: tuple[Extra, ...]) -> None:
        self.blocks, self.extras = blocks, extras
        self._by_key = {e.key: e for e in extras}

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return no exclusions: entries of ``extra_config`` and the blocks say it all."""
        return Exclusions(())

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the recipe of the module's entry, else the base's where a block holds it."""
        base = declaration.scheme
        if base is None:
            return DeclaredFormat(None, "unlisted")
        extra = self._extra(module)
        inside = role(module) not in ("lm_head", "embedding", "norm")
        if self.blocks:
            inside = any(module.startswith(b) for b in self.blocks)
        if extra is None:
            if not inside:
                return DeclaredFormat(None, "unlisted")
            return DeclaredFormat(base.algo, "uniform", "", base.group_size, base)
        default = base.format.bits if inside and base.format is not None else 16
        bits = integer(extra.changes.get("bits", default)) or default
        if bits >= 16:
            return DeclaredFormat(None, "excluded", extra.key)
        scheme = _changed(base, extra.changes)
        return DeclaredFormat(scheme.algo, "exact", extra.key, scheme.group_size, scheme)

    def _extra(self, module: str) -> Extra | None:
        found = self._by_key.get(module)
        if found is not None:
            return found
        for extra in self.extras:
            if module.endswith(f".{extra.key}"):
                return extra
        return next((e for e in self.extras if e.regex is not None and e.regex.match(module)), None)


def parse_auto_round(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise AutoRound's own config (``quant_method: auto-round``, and Intel's ``inc``)."""
    problems: list[str] = []
    unclear: list[str] = []
    bits = _bits(body, "bits", unclear)
    packing = text(body.get("packing_format"))
    data_type = text(body.get("data_type")).lower() or "int"
    inputs = _auto_round_inputs(body)
    fmt = _auto_round_format(packing, data_type, bits, body.get("group_size"), unclear)
    if fmt is FORMATS["fp8_per_channel"] and inputs == "static":
        fmt = FORMATS["fp8"]
    extras = tuple(Extra(str(k), mapping(v)) for k, v in mapping(body.get("extra_config")).items())
    unclear += [
        f"extra_config holds {e.key!r}, which does not compile"
        for e in extras
        if _SPECIAL & set(e.key) and e.regex is None
    ]
    blocks = body.get("block_name_to_quantize", body.get("to_quant_block_names"))
    names = blocks.split(",") if isinstance(blocks, str) else list(_flat(blocks))
    scheme = Scheme(
        fmt.algo if fmt is not None else f"{data_type} {bits or ''}".strip(),
        fmt,
        inputs,
        body.get("sym", True) is not False,
        group_of(body.get("group_size")),
    )
    return Declaration(
        file,
        "auto-round",
        "auto-round",
        scheme.algo,
        scheme.group_size,
        problems=tuple(problems),
        scheme=scheme,
        dialect=AutoRound(tuple(n.strip() for n in names), extras),
        unclear=tuple(unclear),
    )


def _auto_round_inputs(body: Mapping[str, Any]) -> Inputs:
    bits = integer(body.get("act_bits"))
    if bits is None or bits >= 16:
        return "none"
    if text(body.get("act_data_type")).startswith("nv_fp") or (
        "nv_fp" in text(body.get("data_type"))
    ):
        return "local"
    return "dynamic" if body.get("act_dynamic", True) is not False else "static"


def _auto_round_format(
    packing: str, data_type: str, bits: int | None, group: Any, unclear: list[str]
) -> Format | None:
    """Return the format of a packing, a data type and a width; None where they are not known."""
    sizes = pair(group)
    if data_type == "int" and "awq" in packing:
        return _sized(FORMATS["awq"], bits, group)
    if data_type == "int" and ("gptq" in packing or packing in ("", "auto_round")):
        return _sized(FORMATS["gptq"], bits, group)
    if data_type == "int" and "llm_compressor" in packing:
        return _sized(FORMATS["int_packed"], bits, group)
    if "mx_fp" in data_type and bits in (4, 8):
        return FORMATS["mxfp4" if bits == 4 else "mxfp8"]
    if "nv_fp" in data_type and bits == 4:
        return FORMATS["nvfp4_ct"]
    if data_type.startswith("fp") and bits == 8:
        if sizes is not None:
            return FORMATS["fp8_block"].sized(block=sizes)
        return FORMATS["fp8_per_channel" if group == -1 else "fp8"]
    unclear.append(f"data_type {data_type!r} of {bits} bits, packing_format {packing!r}")
    return None


AWQ = Awq()
