# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' configs: recipes with targets, as llm-compressor, AutoRound and Kimi write
them.

Sources: compressed-tensors 0.20 ``quantization/quant_config.py``, ``quant_scheme.py``,
``quant_args.py``, ``utils/match.py``; vLLM 0.32 ``compressed_tensors/compressed_tensors.py`` and
``utils.py`` (``find_matched_target``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from verifier.schemes.declared import (
    Declaration,
    DeclaredFormat,
    Dialect,
    Group,
    Inputs,
    Scheme,
    Via,
    classes_of,
)
from verifier.schemes.dialects.common import (
    CLASS_NAME,
    KNOWN_CLASSES,
    NamedExclusions,
    integer,
    mapping,
    name_lists,
    pair,
    text,
)
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMATS, Format
from verifier.schemes.patterns import Names
from verifier.schemes.roles import role


@dataclass(frozen=True, slots=True)
class Args:
    """The arguments of one quantizer, with compressed-tensors' defaults."""

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    symmetric: bool
    dynamic: bool | str
    block: tuple[int, int] | None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Args:
        """Return the arguments that an object states."""
        group = integer(raw.get("group_size"))
        strategy = text(raw.get("strategy")).lower()
        if not strategy:
            strategy = "tensor" if group is None else ("channel" if group == -1 else "group")
        dynamic = raw.get("dynamic", False)
        return cls(
            integer(raw.get("num_bits")) or 8,
            text(raw.get("type")).lower() or "int",
            strategy,
            None if group == -1 else group,
            raw.get("symmetric", True) is not False,
            dynamic if isinstance(dynamic, bool | str) else False,
            pair(raw.get("block_structure")),
        )

    def __str__(self) -> str:
        group = f" {self.group_size}" if self.group_size else ""
        return f"{self.kind} {self.bits} {self.strategy}{group}"


def _preset(bits: int, kind: str, strategy: str, group: int | None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group} | more


_TOKEN = {"dynamic": True, "strategy": "token"}
_NVFP4 = _preset(4, "float", "tensor_group", 16)
_MXFP4 = _preset(4, "float", "group", 32)
_MXFP8 = _preset(8, "float", "group", 32)
PRESETS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "UNQUANTIZED": (None, None),
    "NVFP4": (_NVFP4, _NVFP4 | {"dynamic": "local"}),
    "NVFP4A16": (_NVFP4, None),
    "MXFP4": (_MXFP4, _MXFP4 | {"dynamic": True}),
    "MXFP4A16": (_MXFP4, None),
    "MXFP8": (_MXFP8, _MXFP8 | {"dynamic": True}),
    "MXFP8A16": (_MXFP8, None),
    "FP8": (_preset(8, "float", "tensor", None), _preset(8, "float", "tensor", None)),
    "FP8_DYNAMIC": (
        _preset(8, "float", "channel", None),
        _preset(8, "float", "token", None, dynamic=True),
    ),
    "FP8_BLOCK": (
        _preset(8, "float", "block", None, block_structure=[128, 128]),
        _preset(8, "float", "group", 128, dynamic=True),
    ),
    "W8A8": (_preset(8, "int", "channel", None), _preset(8, "int", "token", None, dynamic=True)),
    "INT8": (_preset(8, "int", "channel", None), _preset(8, "int", "token", None, dynamic=True)),
    "W4A16_ASYM": (_preset(4, "int", "group", 128, symmetric=False), None),
    "W4AFP8": (_preset(4, "int", "group", 128), {"num_bits": 8, "type": "float"} | _TOKEN),
    **{f"W{b}A16": (_preset(b, "int", "group", 128), None) for b in range(2, 9)},
    **{
        f"W{b}A{a}": (_preset(b, "int", "group", 128), {"num_bits": a, "type": "int"} | _TOKEN)
        for a in (4, 8)
        for b in range(2, a)
    },
    "W4A4": (_preset(4, "int", "group", 128), {"num_bits": 4, "type": "int"} | _TOKEN),
}
"""The presets by name: arguments of weights and of inputs."""

NAMED: dict[str, tuple[str, ...]] = {
    "nvfp4-pack-quantized": ("nvfp4_ct",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp6-pack-quantized": ("mxfp6_e2m3",),
    "mxfp8-quantized": ("mxfp8",),
    "float-quantized": ("fp8", "fp8_per_channel", "fp8_block"),
    "int-quantized": ("int8",),
    "naive-quantized": ("fp8", "fp8_per_channel", "fp8_block", "int8", "mxfp8"),
    "pack-quantized": ("int_packed",),
}
"""The formats that each ``format`` of a config may be."""
REMOVED = frozenset({"marlin-24", "sparse-24-bitmask", "sparse-bitmask"})
"""Formats that compressed-tensors and vLLM 0.32 no longer read."""
_INTEGER_STRATEGIES = frozenset({"tensor", "channel", "group"})


ROUTERS_BY_CONFIG = frozenset(
    {"qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "lfm2_moe", "k2_horizon"}
)
"""The families whose routers vLLM 0.32 builds as the config says; those of all others it builds
unquantized (``GateLinear`` without ``quant_config``), whether they are ignored or not."""


_TEXT = "language_model."


class CompressedTensors(Dialect):
    """Targets by name, then by class; exclusions by name and ``re:`` pattern.

    Args:
        family: the ``model_type``; '' where it is not known.
        text: whether the config is the text model's alone (``text_config``), whose names have no
            ``language_model.``.
    """

    def __init__(self, family: str = "", *, text: bool = False) -> None:
        self.family, self.text = family, text

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return the ``ignore`` list."""
        return NamedExclusions(patterns, _TEXT if self.text else "")

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the recipe of the first target that matches by name, else by class."""
        classes = classes_of(module)
        if self.text:
            if role(module) in ("vision", "projector"):
                return DeclaredFormat(None, "unlisted")
            module = module.removeprefix(_TEXT)
        ignored = declaration.exclusions
        if ignored.strict(module) or any(c in ignored.patterns for c in classes):
            return DeclaredFormat(None, "excluded")
        for group in declaration.groups:
            if entry := group.names.by_name(module):
                return _of_group(group, "group", entry)
        for group in declaration.groups:
            if entry := group.names.by_class(classes):
                return _of_group(group, "class", entry)
        return DeclaredFormat(None, "unlisted")

    def expects(self, declaration: Declaration, module: str) -> bool:
        """Whether vLLM builds it quantized; vLLM's ``Linear`` excludes heads and most routers."""
        found = declaration.declared_for(module)
        kind = role(module)
        if found.via == "class" and kind == "lm_head":
            return False
        if kind == "router" and self.family and self.family not in ROUTERS_BY_CONFIG:
            return False
        return found.algo is not None


def _of_group(group: Group, via: Via, entry: str) -> DeclaredFormat:
    scheme = group.scheme
    if not scheme.algo:  # the preset UNQUANTIZED, or a group of activations alone
        return DeclaredFormat(None, "unlisted", entry)
    return DeclaredFormat(scheme.algo, via, entry, scheme.group_size, scheme)


def parse(
    body: Mapping[str, Any], file: str, config: Mapping[str, Any] | None = None
) -> Declaration:
    """Normalise a compressed-tensors config.

    Args:
        body: the config.
        file: the file that holds it.
        config: the whole config.json.
    """
    family = text(mapping(config).get("model_type"))
    inner = mapping(mapping(config).get("text_config"))
    alone = inner.get("quantization_config") is body
    problems: list[str] = []
    unclear: list[str] = []
    conflicts: list[str] = []
    if body.get("config_groups") is None:  # nothing says how modules are quantized
        missing = ("there is no config_groups",)
        return Declaration(
            file,
            "foreign",
            "compressed-tensors",
            None,
            exclude=name_lists(body, ("ignore",), problems),
            kv=_kv(body.get("kv_cache_scheme"), unclear),
            problems=tuple(problems),
            unclear=missing,
        )
    overall = text(body.get("format"))
    groups = _groups(body.get("config_groups"), overall, problems, unclear, conflicts)
    _sparsity(body.get("sparsity_config"), unclear)
    exclude = name_lists(body, ("ignore",), problems)
    unclear += [f"ignore holds {p!r}, which does not compile" for p in Names(exclude).uncompiled]
    schemes = tuple(dict.fromkeys(g.scheme for g in groups if g.scheme.algo))
    one = schemes[0] if len(schemes) == 1 else None
    return Declaration(
        file,
        "compressed-tensors",
        "compressed-tensors",
        one.algo if one else None,
        one.group_size if one else None,
        exclude,
        kv=_kv(body.get("kv_cache_scheme"), unclear),
        problems=tuple(problems),
        groups=tuple(groups),
        scheme=one,
        dialect=CompressedTensors(family, text=alone),
        unclear=tuple(unclear),
        conflicts=tuple(conflicts),
        transforms=_transforms(body.get("transform_config"), unclear),
    )


def _groups(
    raw: Any, overall: str, problems: list[str], unclear: list[str], conflicts: list[str]
) -> list[Group]:
    if not isinstance(raw, Mapping):
        problems.append("config_groups is not an object")
        return []
    groups = []
    for name, value in raw.items():
        if isinstance(value, list):
            group = _preset_group(str(name), value, overall, unclear)
        elif isinstance(value, Mapping):
            group = _group(str(name), value, overall, unclear, conflicts)
        else:
            group = None
            problems.append(f"config_groups[{name!r}] is not an object")
        if group is not None:
            groups.append(group)
    return groups


def _preset_group(name: str, targets: list[Any], overall: str, unclear: list[str]) -> Group | None:
    preset = PRESETS.get(name.upper())
    if preset is None:
        unclear.append(f"config_groups names {name!r}, which is not a preset")
        return None
    weights, inputs = preset
    raw = {"targets": targets, "weights": weights, "input_activations": inputs}
    return _group(name, raw, overall, unclear, [])


def _group(
    name: str,
    raw: Mapping[str, Any],
    overall: str,
    unclear: list[str],
    conflicts: list[str],
) -> Group | None:
    targets = raw.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        unclear.append(f"config_groups[{name!r}] has no list of targets")
        return None
    _check_targets(name, targets, unclear)
    weights = raw.get("weights")
    if not isinstance(weights, Mapping):
        return Group(name, tuple(targets), Scheme(""))
    named = text(raw.get("format")) or overall
    args = Args.read(weights)
    fmt = format_of_args(args, named)
    if fmt is None and named not in NAMED:
        unclear.append(f"config_groups[{name!r}] has weights {args}, format {named!r}")
    if named in REMOVED:
        unclear.append(f"config_groups[{name!r}] has format {named!r}, which is no longer read")
    elif fmt is not None and named in NAMED and fmt.name not in NAMED[named]:
        conflicts.append(f"config_groups[{name!r}] says format {named!r} and weights {args}")
    scheme = Scheme(
        named if named in NAMED else str(args),
        fmt,
        _inputs(raw.get("input_activations")),
        args.symmetric,
        args.group_size,
        "weight_scale",
        args.bits,
        args.kind,
        text(weights.get("actorder")).lower() in ("group", "dynamic"),
    )
    return Group(name, tuple(targets), scheme)


def _check_targets(name: str, targets: list[str], unclear: list[str]) -> None:
    for pattern in Names(targets).uncompiled:
        unclear.append(f"config_groups[{name!r}] has target {pattern!r}, which does not compile")
    for target in targets:
        attention = target.endswith("Attention")  # the cache's, which is coupled with its scales
        if CLASS_NAME.match(target) and target not in KNOWN_CLASSES and not attention:
            unclear.append(f"config_groups[{name!r}] targets the class {target!r}")


def format_of_args(args: Args, named: str = "") -> Format | None:
    """Return the format of weights with some arguments; None where there is none.

    vLLM chooses by the arguments; ``named``, the config's ``format``, determines how integers of
    eight bits are stored.
    """
    if args.kind == "float":
        return _float_format(args)
    if args.kind != "int" or not 1 <= args.bits <= 8 or args.strategy not in _INTEGER_STRATEGIES:
        return None
    block = (1, args.group_size) if args.strategy == "group" and args.group_size else None
    apart = named in ("int-quantized", "naive-quantized") or (
        named != "pack-quantized" and args.bits == 8 and block is None
    )
    if apart:
        return FORMATS["int8"].sized(block=block)
    return FORMATS["int_packed"].sized(bits=args.bits, block=block)


def _float_format(args: Args) -> Format | None:
    by_shape = {
        (4, "tensor_group", 16): "nvfp4_ct",
        (4, "group", 32): "mxfp4",
        (6, "group", 32): "mxfp6_e2m3",
        (8, "group", 32): "mxfp8",
    }
    name = by_shape.get((args.bits, args.strategy, args.group_size or 0))
    if name is not None:
        return FORMATS[name]
    if args.bits != 8:
        return None
    if args.strategy == "block":
        return FORMATS["fp8_block"].sized(block=args.block or (128, 128))
    names = {"tensor": "fp8", "channel": "fp8_per_channel"}
    return FORMATS[names[args.strategy]] if args.strategy in names else None


def _inputs(raw: Any) -> Inputs:
    if not isinstance(raw, Mapping):
        return "none"
    dynamic = Args.read(raw).dynamic
    if dynamic == "local":
        return "local"
    return "dynamic" if dynamic else "static"


def _kv(raw: Any, unclear: list[str]) -> str | None:
    if raw is None or raw == {}:
        return None
    if not isinstance(raw, Mapping):
        unclear.append("kv_cache_scheme is not an object")
        return None
    args = Args.read(raw)
    if args.kind == "float" and args.bits == 4:
        return "NVFP4"
    return f"{'FP' if args.kind == 'float' else 'INT'}{args.bits}"


def _sparsity(raw: Any, unclear: list[str]) -> None:
    config = mapping(raw)
    if config.get("targets") or text(config.get("format")) in REMOVED:
        unclear.append("sparsity_config has targets: sparse weights are no longer read")


def _transforms(raw: Any, unclear: list[str]) -> tuple[str, ...]:
    """Return the names of the online transforms that a reader applies to activations or weights."""
    groups = mapping(mapping(raw).get("config_groups"))
    if raw and not groups:
        unclear.append("transform_config has no config_groups")
    return tuple(
        f"{name}: {text(mapping(g).get('type')) or 'unknown'}" for name, g in groups.items()
    )
