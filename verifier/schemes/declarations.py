# SPDX-License-Identifier: Apache-2.0
"""What config.json and hf_quant_config.json say about quantization, in one shape whatever the
dialect.

Dialects read: ModelOpt flat (``quant_algo``, ``ignore``), ModelOpt nested (``quantization:
{exclude_modules}``), MiniMax vendor (``quant_method: mxfp8``, ``ignored_layers``), DeepSeek block
FP8 (``quant_method: fp8``, ``weight_block_size``). Others are *not judged*: `Declaration.known` is
False and ``method`` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from verifier.checkpoint import Checkpoint
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMAT_OF_ALGO, FORMATS, Format, same_layout
from verifier.schemes.groups import packed_name
from verifier.schemes.modules import Module

MAX_WILDCARDS = 1000
"""The most exclusions with wildcards; a release has some for each layer."""
MAX_PARTS = 64
"""The most containers of a module that are looked up; names nest some ten deep."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of ``quantized_layers``."""

    algo: str
    group_size: int | None = None


class DeclaredFormat(NamedTuple):
    """What the declaration says about one module: its algorithm (None: unquantized) and how it says
    so.

    ``via`` is ``uniform``, ``exact``, ``container``, ``packed``, ``excluded`` or ``unlisted``.
    """

    algo: str | None
    via: str
    entry: str = ""
    group_size: int | None = None

    @property
    def format(self) -> Format | None:
        """The format of the algorithm, where it is one that is judged."""
        return FORMATS.get(FORMAT_OF_ALGO.get(self.algo or "", ""))


@dataclass(frozen=True)
class Declaration:
    """A quantization declaration, normalised. ``algo`` is None where the file names none."""

    file: str
    form: str
    method: str
    algo: str | None
    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Entry] = field(default_factory=dict)
    kv: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether this dialect is one that rules judge."""
        return self.form != "foreign"

    @property
    def mixed(self) -> bool:
        """Whether modules are declared one by one; then a module without an entry is
        unquantized.
        """
        return self.algo == "MIXED_PRECISION"

    @cached_property
    def exclusions(self) -> Exclusions:
        """The exclusion patterns, compiled."""
        return Exclusions(self.exclude)

    def declared_for(self, module: str) -> DeclaredFormat:
        """Return what the declaration says about a module on disk, strictly read."""
        found = self._covers.get(module)
        if found is None:
            found = self._covers[module] = self._cover(module)
        return found

    @cached_property
    def _covers(self) -> dict[str, DeclaredFormat]:
        """Answers already given: every rule asks about every module."""
        return {}

    def _cover(self, module: str) -> DeclaredFormat:
        if not self.mixed:
            if self.exclusions.strict(module):
                return DeclaredFormat(None, "excluded")
            return DeclaredFormat(self.algo, "uniform", group_size=self.group_size)
        found = self.layers.get(module)
        if found:
            return DeclaredFormat(found.algo, "exact", module, found.group_size)
        packed = packed_name(module)
        if packed and packed in self.layers:
            return DeclaredFormat(
                self.layers[packed].algo, "packed", packed, self.layers[packed].group_size
            )
        head = module
        for _ in range(MAX_PARTS):
            head = head.rpartition(".")[0]
            if not head:
                break
            if head in self.layers:
                return DeclaredFormat(
                    self.layers[head].algo, "container", head, self.layers[head].group_size
                )
        return DeclaredFormat(None, "unlisted")


@dataclass(frozen=True, slots=True)
class Declarations:
    """Both files' declarations. Engines differ in which they read first; `effective` is
    config.json's, else the other.
    """

    inline: Declaration | None
    file: Declaration | None

    @property
    def effective(self) -> Declaration | None:
        """The declaration that vLLM and SGLang act on."""
        return self.inline or self.file


def read_declarations(checkpoint: Checkpoint) -> Declarations:
    """Return the declarations of a checkpoint's two configs."""
    config = checkpoint.config or {}
    inline = config.get("quantization_config")
    if inline is None and isinstance(config.get("text_config"), dict):
        inline = config["text_config"].get("quantization_config")
    nested = checkpoint.hf_quant_config
    return Declarations(
        parse(inline, "config.json") if inline is not None else None,
        parse(nested, "hf_quant_config.json") if nested is not None else None,
    )


def format_of(module: Module, declaration: Declaration | None) -> Format | None:
    """Return the format that a quantized module must satisfy: the declared one, else the one that
    it shows.

    None where it is not quantized, where it shows another format than the declared one (QC305,
    QC408, QC410), or where an algorithm is declared that is not judged.
    """
    return fitting(
        module,
        declaration.declared_for(module.name)
        if declaration is not None and declaration.known
        else None,
    )


def fitting(module: Module, cover: DeclaredFormat | None) -> Format | None:
    """Return `format_of` a module where what the declaration says about it is known already."""
    if not module.quantized or module.weight is None or module.dims is None:
        return None
    shown = module.inferred_format
    found = cover.format if cover is not None and cover.algo is not None else shown
    if found is None or found.weight_dtype != module.weight.dtype:
        return None
    return found if shown is None or same_layout(found, shown) else None


def parse(raw: Any, file: str) -> Declaration:
    """Normalise one declaration; what is malformed is listed in ``problems``, never raised."""
    problems: list[str] = []
    if not isinstance(raw, Mapping):
        return Declaration(
            file, "foreign", "", None, problems=(f"is a {type(raw).__name__}, not an object",)
        )
    body, form = raw, "flat"
    if isinstance(raw.get("quantization"), Mapping):
        body, form = raw["quantization"], "nested"
    method = str(
        raw.get("quant_method")
        or body.get("quant_method")
        or ("modelopt" if "quant_algo" in body else "")
    )
    algo = body.get("quant_algo")
    if algo is not None and not isinstance(algo, str):
        problems.append(f"quant_algo is {algo!r}, not a string")
        algo = None
    group = _integer(body.get("group_size"))
    if method in ("mxfp8", "fp8"):
        form = "vendor"
        vendor, size = _vendor_algo(method, body, problems)
        if algo is None:  # DeepSeek-V4 states both: the algorithm is then the finer word
            algo, group = vendor, size
    elif not method.startswith("modelopt") and algo is None:
        form = "foreign"
    if group is None:
        group = _group_size_of(body.get("config_groups"))
    exclude: list[str] = []
    for key in ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert"):
        value = body.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            problems.append(f"{key} is not a list of strings")
        else:
            wild = sum(any(c in v for c in "*?[") for v in value)
            if wild > MAX_WILDCARDS:
                problems.append(
                    f"{key} holds {wild:,} patterns with wildcards; more than {MAX_WILDCARDS:,} are not read"
                )
            else:
                exclude += value
    exclude = list(dict.fromkeys(exclude))
    return Declaration(
        file,
        form,
        method,
        algo,
        group,
        tuple(exclude),
        _layers(body.get("quantized_layers"), problems),
        _kv(body),
        tuple(problems),
    )


def _vendor_algo(
    method: str, body: Mapping[str, Any], problems: list[str]
) -> tuple[str | None, int | None]:
    block = body.get("weight_block_size")
    if block is None:
        return ("MXFP8", 32) if method == "mxfp8" else ("FP8", None)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(b) is int and b > 0 for b in block)
    ):
        problems.append(f"weight_block_size is {str(block)[:40]}, not two positive integers")
        return None, None
    if method == "mxfp8" or block == [1, 32]:
        return "MXFP8", block[1]
    return "FP8_PB_WO", block[1]


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
            layers[name] = Entry(algo, _integer(entry.get("group_size")))
    return layers


def _group_size_of(groups: Any) -> int | None:
    if not isinstance(groups, Mapping):
        return None
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("group_size") is not None:
            return _integer(weights["group_size"])
    return None


def _kv(body: Mapping[str, Any]) -> str | None:
    scheme = body.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return "FP8" if scheme.get("num_bits") == 8 else str(scheme.get("num_bits"))
    value = body.get("kv_cache_quant_algo") or scheme
    return str(value) if value else None


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None
