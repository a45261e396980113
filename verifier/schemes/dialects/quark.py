# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's configs: a recipe for all, others by layer, and a list of what is excluded.

Sources: vLLM 0.32 ``quark/quark.py``, ``quark/utils.py``, ``quark/schemes``; Quark 0.13's
exporter.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from verifier.schemes.declared import (
    Declaration,
    DeclaredFormat,
    Dialect,
    Group,
    Inputs,
    Scheme,
)
from verifier.schemes.dialects.common import (
    NamedExclusions,
    integer,
    mapping,
    name_lists,
    pair,
    text,
)
from verifier.schemes.dialects.modelopt import tiles
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMATS, Format
from verifier.schemes.patterns import Names

_KV_LAYERS = ("*k_proj", "*v_proj")


class Quark(Dialect):
    """Exclusions by name and ``re:`` pattern; recipes by glob or ``re:`` pattern, else for all."""

    def __init__(self, layers: tuple[Group, ...]) -> None:
        self.layers = layers

    @cached_property
    def _globs(self) -> tuple[Group, ...]:
        return tuple(g for g in self.layers if any(c in g.name for c in "*?["))

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return the ``exclude`` list."""
        return NamedExclusions(patterns)

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the first layer recipe that matches, else the one for all."""
        if declaration.exclusions.strict(module):
            return DeclaredFormat(None, "excluded")
        for group in self.layers:
            if group.names.by_name(module) or (
                group in self._globs and fnmatch.fnmatchcase(module, group.name)
            ):
                return _cover(group.scheme, "group", group.name)
        return _cover(declaration.scheme, "uniform", "")


def _cover(scheme: Scheme | None, via: Any, entry: str) -> DeclaredFormat:
    if scheme is None or not scheme.algo:
        return DeclaredFormat(None, "unlisted", entry)
    return DeclaredFormat(scheme.algo, via, entry, scheme.group_size, scheme)


def parse(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise Quark's config."""
    problems: list[str] = []
    unclear: list[str] = []
    export = body.get("export")
    if not isinstance(export, Mapping):
        unclear.append("there is no export, which vLLM requires")
    packing = text(mapping(export).get("pack_method")) or "reorder"
    everywhere = _scheme("global_quant_config", body.get("global_quant_config"), packing, unclear)
    groups = []
    for name, raw in mapping(body.get("layer_quant_config")).items():
        scheme = _scheme(f"layer_quant_config[{name!r}]", raw, packing, unclear)
        cache = mapping(raw).get("weight") is None and name.endswith(("k_proj", "v_proj"))
        groups.append(Group(str(name), (str(name),), scheme or Scheme("")))
        if cache:  # a recipe of the cache alone
            groups.pop()
    if mapping(body.get("layer_type_quant_config")):
        unclear.append("layer_type_quant_config names classes")
    exclude = name_lists(body, ("exclude",), problems)
    unclear += [f"exclude holds {p!r}, which does not compile" for p in Names(exclude).uncompiled]
    return Declaration(
        file,
        "quark",
        "quark",
        everywhere.algo if everywhere and not groups else None,
        everywhere.group_size if everywhere else None,
        exclude,
        kv=_kv(body, mapping(export)),
        problems=tuple(problems),
        groups=tuple(groups),
        scheme=everywhere,
        dialect=Quark(tuple(groups)),
        unclear=tuple(unclear),
    )


def _kv(body: Mapping[str, Any], export: Mapping[str, Any]) -> str | None:
    listed = export.get("kv_cache_group")
    named = mapping(body.get("kv_cache_quant_config"))
    if not listed and not named:
        return None
    spec = next(
        (
            mapping(mapping(raw).get("output_tensors"))
            for name, raw in {**mapping(body.get("layer_quant_config")), **named}.items()
            if name.endswith(("k_proj", "v_proj"))
        ),
        {},
    )
    return "FP8" if text(spec.get("dtype")).startswith("fp8") else text(spec.get("dtype")) or "FP8"


def _scheme(where: str, raw: Any, packing: str, unclear: list[str]) -> Scheme | None:
    weight = mapping(raw).get("weight")
    if weight is None:
        return None
    specs = [mapping(s) for s in (weight if isinstance(weight, list) else [weight])]
    words = " over ".join(_words(s) for s in specs)
    fmt = _format(specs, packing, mapping(raw).get("input_tensors"))
    if fmt is None:
        unclear.append(f"{where} has weights {words}")
    first = specs[0] if specs else {}
    return Scheme(
        words,
        fmt,
        _inputs(mapping(raw).get("input_tensors")),
        first.get("symmetric") is not False,
        integer(first.get("group_size")),
        bits=_width(text(first.get("dtype"))),
        kind="int" if "int" in text(first.get("dtype")) else "float",
    )


def _width(dtype: str) -> int:
    """Return the bits of a dtype by its name (``fp8_e4m3``, ``uint4``), or 0."""
    found = re.match(r"[a-z]+(\d)", dtype)
    return int(found[1]) if found else 0


def _words(spec: Mapping[str, Any]) -> str:
    size = integer(spec.get("group_size"))
    return " ".join(
        filter(None, (text(spec.get("dtype")), text(spec.get("qscheme")), str(size or "")))
    )


def _format(specs: list[Mapping[str, Any]], packing: str, inputs: Any) -> Format | None:
    kinds = [(text(s.get("dtype")), text(s.get("qscheme"))) for s in specs]
    if kinds == [("fp4", "per_group"), ("fp8_e4m3", "per_tensor")]:
        return FORMATS["nvfp4_quark"] if specs[0].get("group_size") == 16 else None
    if len(specs) != 1:
        return None
    (dtype, scheme), spec = kinds[0], specs[0]
    size, block = integer(spec.get("group_size")), spec.get("block_size")
    if dtype == "fp4" and scheme == "per_group" and size == 32:
        static = _inputs(inputs) == "static"
        return FORMATS["w4a8_mxfp4_fp8" if static else "mxfp4"]
    if dtype in ("fp6_e2m3", "fp6_e3m2") and scheme == "per_group" and size == 32:
        return FORMATS["mxfp6_e2m3" if dtype == "fp6_e2m3" else "mxfp6_e3m2"]
    if dtype == "fp8_e4m3":
        return _fp8(scheme, size, block)
    if dtype == "int8" and scheme in ("per_tensor", "per_channel"):
        return FORMATS["int8"]
    if dtype in ("int4", "uint4") and scheme == "per_group" and size:
        signed = dtype == "int4" and spec.get("symmetric") is not False
        name = f"{'int4' if signed else 'uint4'}_quark{'' if packing == 'reorder' else '_order'}"
        return FORMATS[name].sized(block=(1, size))
    return None


def _fp8(scheme: str, size: int | None, block: Any) -> Format | None:
    if scheme in ("per_tensor", "per_channel"):
        return FORMATS["fp8" if scheme == "per_tensor" else "fp8_per_channel"]
    if scheme == "per_group" and size == 32:
        return FORMATS["mxfp8"]
    sizes = pair(block)
    if scheme == "per_block" and sizes is not None:
        return FORMATS["mxfp8"] if sizes == (1, 32) else tiles(sizes)
    return None


def _inputs(raw: Any) -> Inputs:
    if raw is None:
        return "none"
    specs = raw if isinstance(raw, list) else [raw]
    if len(specs) == 2:
        return "local"
    return "dynamic" if mapping(specs[0] if specs else {}).get("is_dynamic") else "static"
