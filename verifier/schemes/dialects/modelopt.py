# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's configs, flat (config.json) and nested (hf_quant_config.json), and FP8 and MXFP8 by
themselves (``quant_method: fp8``, ``mxfp8``).

Sources: ModelOpt 0.47 ``export/convert_hf_config.py`` and ``quant_utils.py``; vLLM 0.32
``modelopt.py``, ``fp8.py``, ``models/deepseek_v4``; SGLang 0.5.23 ``modelopt_quant.py``. Algorithms
are read in any case, as vLLM does: ModelOpt itself writes ``fp8_pb_wo`` and ``mxfp4``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from verifier.schemes.declared import (
    PLAIN,
    Declaration,
    DeclaredFormat,
    Dialect,
    Entry,
    Group,
    Inputs,
    Scheme,
    Via,
)
from verifier.schemes.dialects.common import (
    EXCLUSION_KEYS,
    integer,
    mapping,
    name_lists,
    pair,
    text,
)
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import (
    FORMATS,
    KNOWN_ALGOS,
    MODELOPT_ALGOS,
    Format,
)
from verifier.schemes.groups import packed_name
from verifier.schemes.roles import role

MAX_PARTS = 64
"""The most containers of a module that are looked up; names nest some ten deep."""
_INPUTS: dict[str, Inputs] = {
    "NVFP4": "static",
    "NVFP4_AWQ": "static",
    "NVFP4_SVD": "static",
    "W4A8_NVFP4_FP8": "static",
    "W4A8_MXFP4_FP8": "static",
    "W4A8_AWQ": "static",
    "INT8_SQ": "static",
    "FP8": "static",
    "MXFP8": "dynamic",
    "FP8_PER_CHANNEL_PER_TOKEN": "dynamic",
    "W8A8_SQ_PER_CHANNEL": "static",
    "FP8_PB_WO": "dynamic",
    "FP8_PB_REAL": "dynamic",
    "FP8_BLOCK_SCALES": "dynamic",
    "MXFP4": "none",
    "W4A16_NVFP4": "none",
    "W4A16_AWQ": "none",
    "INT4_AWQ": "none",
    "W8A16": "none",
}
"""How each algorithm quantizes activations, where no config group says otherwise."""
_VARIABLE = frozenset({"w4a16_nvfp4", "int4_awq", "w4a8_awq"})
"""Formats whose group size a config may choose."""


class ModelOpt(Dialect):
    """Exclusions for all, or entries for single modules (MIXED_PRECISION)."""

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return what a declaration says about a module, strictly read."""
        if not declaration.mixed:
            return super().cover(declaration, module)
        layers = declaration.layers
        if module in layers:
            return _of_entry(layers[module], "exact")
        packed = packed_name(module)
        if packed and packed in layers:
            return _of_entry(layers[packed], "packed", packed)
        head = module
        for _ in range(MAX_PARTS):
            head = head.rpartition(".")[0]
            if not head:
                break
            if head in layers:
                return _of_entry(layers[head], "container", head)
        rest = declaration.scheme
        if rest is None:
            return DeclaredFormat(None, "unlisted")
        return DeclaredFormat(rest.algo, "uniform", "", rest.group_size, rest)

    def expects(self, declaration: Declaration, module: str) -> bool:
        """Whether all readers build the module as quantized; what no entry names is not."""
        if declaration.mixed:
            return declaration.declared_for(module).via in ("exact", "packed", "container")
        return super().expects(declaration, module)


class Fp8(ModelOpt):
    """FP8 by itself: readers leave heads, routers and embeddings unquantized by default."""

    def expects(self, declaration: Declaration, module: str) -> bool:
        """Whether vLLM builds the module as FP8: its model code leaves some kinds plain."""
        plain = role(module) in ("lm_head", "router", "embedding", "indexer", "vision", "projector")
        return not plain and super().expects(declaration, module)


class DeepseekV4(Dialect):
    """DeepSeek-V4: its routed experts have a format of their own, and its model code knows which
    other layers are FP8.

    Exclusions are those of ModelOpt's experts alone (``moe_quant_algo``): what they name keeps the
    vendor's quantization.
    """

    explicit = False

    def __init__(self, experts: Scheme, native: Scheme, patterns: Iterable[str]) -> None:
        self.experts, self.native = experts, native
        self._kept = Exclusions(patterns)

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return no exclusions: nothing here is unquantized by being named."""
        return Exclusions(())

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the experts' recipe for a routed expert, that of FP8 for all else."""
        if module in declaration.layers:
            return _of_entry(declaration.layers[module], "exact")
        scheme: Scheme | None = declaration.scheme
        if _of_expert(module):
            kept = bool(self._kept.patterns) and self._kept.strict(module)
            scheme = self.native if kept else self.experts
        if scheme is None:
            return DeclaredFormat(None, "unlisted")
        return DeclaredFormat(scheme.algo, "implied", "", scheme.group_size, scheme)

    def expects(self, declaration: Declaration, module: str) -> bool:
        """Whether it is a routed expert, which is always quantized."""
        return _of_expert(module)


class Fp8WithMxfp4Experts(Fp8):
    """FP8 whose routed experts are MXFP4 (``store_dtype: mxfp4``); exclusions are those of FP8."""

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return MXFP4 for a routed expert that is not excluded, else what FP8 says."""
        result = super().cover(declaration, module)
        if result.algo is None or not _of_expert(module):
            return result
        scheme = Scheme("MXFP4", FORMATS["mxfp4"], "dynamic", group_size=32)
        return DeclaredFormat(scheme.algo, "implied", "", scheme.group_size, scheme)


def _of_expert(module: str) -> bool:
    return ".experts." in module and ".shared_experts." not in module


def tiles(sizes: tuple[int, int]) -> Format:
    """Return FP8 in tiles of some rows and columns; those of 32x32 have E8M0 scales."""
    if sizes == (32, 32):
        return FORMATS["mxfp8_block"]
    return FORMATS["fp8_block"].sized(block=sizes)


MODELOPT, FP8 = ModelOpt(), Fp8()


@lru_cache(maxsize=1024)
def scheme_of(algo: str, group_size: int | None = None) -> Scheme:
    """Return the recipe that one of ModelOpt's algorithms names."""
    name = MODELOPT_ALGOS.get(algo)
    fmt = FORMATS[name] if name is not None else None
    if fmt is not None and fmt.name in _VARIABLE and group_size and group_size > 0:
        fmt = fmt.sized(block=(1, group_size))
    return Scheme(algo, fmt, _INPUTS.get(algo, "unknown"), group_size=group_size)


@lru_cache(maxsize=4096)
def _of_entry(entry: Entry, via: Via, name: str = "") -> DeclaredFormat:
    """Return what an entry says; ``name`` is that of an entry for more than the module."""
    scheme = scheme_of(entry.algo, entry.group_size)
    return DeclaredFormat(entry.algo, via, name, entry.group_size, scheme)


def parse(raw: Mapping[str, Any], body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise ModelOpt's config; ``body`` is what ``quantization`` holds in the nested form."""
    problems: list[str] = []
    unclear: list[str] = []
    algo = _algo(body, problems)
    groups = _groups(body.get("config_groups"))
    group_size = integer(body.get("group_size"))
    if group_size is None:
        group_size = _first_group_size(groups)
    scheme = scheme_of(algo, group_size) if algo and algo != "MIXED_PRECISION" else None
    if scheme is not None:
        scheme = _with_inputs(scheme, body.get("config_groups"))
    layers = _layers(body.get("quantized_layers"), problems)
    named = {e.algo for e in layers.values()} | ({algo} if algo else set())
    unclear += [f"quant_algo {a!r} is not known" for a in sorted(named - KNOWN_ALGOS)]
    return Declaration(
        file,
        "flat" if body is raw else "nested",
        text(raw.get("quant_method")) or text(body.get("quant_method")) or "modelopt",
        algo,
        group_size,
        name_lists(body, EXCLUSION_KEYS, problems),
        layers,
        kv_of(body),
        tuple(problems),
        groups,
        scheme,
        MODELOPT,
        tuple(unclear),
    )


def parse_fp8(
    body: Mapping[str, Any], file: str, config: Mapping[str, Any] | None = None
) -> Declaration:
    """Normalise FP8 or MXFP8 by itself.

    Args:
        body: the config.
        file: the file that holds it.
        config: the whole config.json, where DeepSeek-V4 says what its experts are.
    """
    problems: list[str] = []
    method = text(body.get("quant_method"))
    stated = _algo(body, problems)
    base = _fp8_scheme(method, body, problems)
    algo, group_size, scheme = stated, integer(body.get("group_size")), base
    if stated is None and base is not None:
        algo, group_size = base.algo, base.group_size
    elif stated is not None and stated != "MIXED_PRECISION":
        scheme = scheme_of(stated, group_size)
    layers = _layers(body.get("quantized_layers"), problems)
    groups = _groups(body.get("config_groups"))
    if group_size is None:
        group_size = _first_group_size(groups)
    exclude = name_lists(body, EXCLUSION_KEYS, problems)
    dialect = _fp8_dialect(method, body, config or {}, exclude)
    if base is not None and isinstance(dialect, DeepseekV4):
        base = replace(base, scale_leaf="")  # its own is called ``scale``
    return Declaration(
        file,
        "vendor",
        method,
        algo,
        group_size,
        exclude,
        layers,
        kv_of(body),
        tuple(problems),
        groups,
        base if isinstance(dialect, DeepseekV4) else scheme,
        dialect,
        (f"quant_algo {stated!r} is not known",) if stated and stated not in KNOWN_ALGOS else (),
    )


def _fp8_dialect(
    method: str, body: Mapping[str, Any], config: Mapping[str, Any], exclude: tuple[str, ...]
) -> Dialect:
    experts = text(body.get("moe_quant_algo")).upper()
    fp4 = text(config.get("expert_dtype")) == "fp4"
    if not experts and not fp4 and text(body.get("store_dtype")) == "mxfp4":
        return Fp8WithMxfp4Experts()
    if not experts and not fp4:
        return FP8 if method == "fp8" else MODELOPT
    native = Scheme("MXFP4", FORMATS["mxfp4"], "dynamic", group_size=32)
    own = scheme_of(experts, integer(body.get("group_size"))) if experts else native
    return DeepseekV4(own, native, exclude if experts else ())


def _fp8_scheme(method: str, body: Mapping[str, Any], problems: list[str]) -> Scheme | None:
    block = body.get("weight_block_size")
    static: Inputs = "static" if body.get("activation_scheme") == "static" else "dynamic"
    if block is None:
        if method == "mxfp8":
            return Scheme("MXFP8", FORMATS["mxfp8"], "dynamic", group_size=32)
        return Scheme("FP8", FORMATS["fp8"], static)
    sizes = pair(block)
    if sizes is None:
        problems.append(f"weight_block_size is {str(block)[:40]}, not two positive integers")
        return None
    if method == "mxfp8" or sizes == (1, 32):
        return Scheme("MXFP8", FORMATS["mxfp8"], "dynamic", group_size=sizes[1])
    fmt = tiles(sizes)
    return Scheme(fmt.algo, fmt, static, group_size=sizes[1], scale_leaf="weight_scale_inv")


def _algo(body: Mapping[str, Any], problems: list[str]) -> str | None:
    algo = body.get("quant_algo")
    if algo is not None and not isinstance(algo, str):
        problems.append(f"quant_algo is {algo!r}, not a string")
        return None
    return algo.upper() if algo else None  # '' is none to vLLM too


def _layers(value: Any, problems: list[str]) -> dict[str, Entry]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.append("quantized_layers is not an object")
        return {}
    layers: dict[str, Entry] = {}
    for name, entry in value.items():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else None
        if not isinstance(algo, str):
            problems.append(f"quantized_layers[{name!r}] has no quant_algo")
        else:
            layers[name] = Entry(algo.upper(), integer(entry.get("group_size")))
    return layers


def _groups(value: Any) -> tuple[Group, ...]:
    """Return the config groups; what targets name other than modules is not checked here."""
    groups = []
    for name, raw in mapping(value).items():
        weights, targets = mapping(mapping(raw).get("weights")), mapping(raw).get("targets")
        if not weights:
            continue
        named = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
        algo = text(mapping(raw).get("quant_algo")) or _words(weights)
        scheme = Scheme(
            algo,
            None,
            inputs_of(mapping(raw)),
            group_size=integer(weights.get("group_size")),
        )
        groups.append(Group(str(name), tuple(named), scheme))
    return tuple(groups)


def _words(weights: Mapping[str, Any]) -> str:
    return f"{text(weights.get('type'))} {integer(weights.get('num_bits')) or ''}".strip()


def inputs_of(group: Mapping[str, Any]) -> Inputs:
    """Return how a config group quantizes activations."""
    raw = group.get("input_activations")
    if not isinstance(raw, Mapping):
        return "none"
    return "dynamic" if raw.get("dynamic") is True else "static"


def _with_inputs(scheme: Scheme, raw: Any) -> Scheme:
    """Return a uniform recipe with the activations that its only config group states.

    vLLM 0.33 reads NVFP4 with null ``input_activations`` as weights alone (vllm#54427).
    """
    groups = [g for g in mapping(raw).values() if isinstance(g, Mapping) and "weights" in g]
    if len(groups) != 1 or "input_activations" not in groups[0]:
        return scheme
    if groups[0]["input_activations"] is None:
        return Scheme(scheme.algo, scheme.format, "none", group_size=scheme.group_size)
    return scheme


def _first_group_size(groups: tuple[Group, ...]) -> int | None:
    return next((g.scheme.group_size for g in groups if g.scheme.group_size is not None), None)


def kv_of(body: Mapping[str, Any]) -> str | None:
    """Return how a config says that the KV cache is quantized."""
    scheme = body.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return "FP8" if scheme.get("num_bits") == 8 else str(scheme.get("num_bits"))
    value = body.get("kv_cache_quant_algo") or scheme
    return str(value) if value else None


__all__ = ["FP8", "MODELOPT", "PLAIN", "DeepseekV4", "inputs_of", "kv_of", "parse", "parse_fp8"]
