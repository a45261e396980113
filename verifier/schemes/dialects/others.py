# SPDX-License-Identifier: Apache-2.0
"""Configs of MXFP4 (gpt-oss), FBGEMM, W4AFP8, MLX, bitsandbytes and torchao.

Sources: vLLM 0.32 ``mxfp4.py``, ``fbgemm_fp8.py``, ``torchao.py``; SGLang 0.5.23 ``w4afp8.py``;
mlx-lm 0.32 ``utils.py`` (a module is quantized where its scales are stored); transformers 5.23
``quantizers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from verifier.schemes.declared import Declaration, DeclaredFormat, Dialect, Scheme
from verifier.schemes.dialects.common import (
    PartExclusions,
    integer,
    mapping,
    name_lists,
    text,
)
from verifier.schemes.exclusions import Exclusions
from verifier.schemes.formats import FORMATS, Format
from verifier.schemes.roles import role

_EXPERT = re.compile(r"\.experts\.\d+\.")


class Implied(Dialect):
    """Readers take as quantized what is stored so; ``entries`` are recipes of single modules."""

    explicit = False

    def __init__(self, entries: Mapping[str, Scheme | None] | None = None) -> None:
        self.entries = entries or {}

    def exclusions(self, patterns: Iterable[str]) -> Exclusions:
        """Return parts of names that are not converted."""
        return PartExclusions(patterns)

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the module's own recipe, else the one for all."""
        stack = _EXPERT.sub(".switch_mlp.", module)
        if module in self.entries or stack in self.entries:
            own = self.entries.get(module, self.entries.get(stack))
            if own is None:
                return DeclaredFormat(None, "excluded", module)
            return DeclaredFormat(own.algo, "exact", module, own.group_size, own)
        found = super().cover(declaration, module)
        return found if found.algo is None else found._replace(via="implied")


class Experts(Dialect):
    """A recipe of routed experts alone."""

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return the recipe for a routed expert that is not excluded."""
        if role(module) != "routed_expert":
            return DeclaredFormat(None, "unlisted")
        return super().cover(declaration, module)


class ExpertsInFp8(Dialect):
    """W4AFP8: routed experts in INT4, all other linear layers in blocks of FP8."""

    explicit = False

    def cover(self, declaration: Declaration, module: str) -> DeclaredFormat:
        """Return INT4 for routed experts, block FP8 for the rest."""
        found = super().cover(declaration, module)
        if found.algo is None or role(module) == "routed_expert":
            return found
        fmt = FORMATS["fp8_block"]
        scheme = Scheme(fmt.algo, fmt, "dynamic", group_size=128, scale_leaf="weight_scale_inv")
        return DeclaredFormat(scheme.algo, "implied", "", 128, scheme)


def _declaration(
    body: Mapping[str, Any],
    file: str,
    method: str,
    scheme: Scheme,
    dialect: Dialect,
    keys: tuple[str, ...] = ("modules_to_not_convert",),
    unclear: Iterable[str] = (),
) -> Declaration:
    problems: list[str] = []
    exclude = name_lists(body, keys, problems)
    return Declaration(
        file,
        method,
        method,
        scheme.algo,
        scheme.group_size,
        exclude,
        problems=tuple(problems),
        scheme=scheme,
        dialect=dialect,
        unclear=tuple(unclear),
    )


def parse_mxfp4(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise gpt-oss's config: vLLM builds its experts as MXFP4, nothing else."""
    scheme = Scheme("MXFP4", FORMATS["mxfp4"], "dynamic", group_size=32)
    return _declaration(body, file, "mxfp4", scheme, Experts())


def parse_fbgemm(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise FBGEMM's FP8 config."""
    fmt = FORMATS["fp8_per_channel"]
    scheme = Scheme(fmt.algo, fmt, "dynamic", scale_leaf="weight_scale")
    return _declaration(body, file, "fbgemm_fp8", scheme, Implied())


def parse_w4afp8(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise SGLang's W4AFP8 config."""
    scheme = Scheme("W4AFP8", FORMATS["w4afp8"], "unknown", group_size=128)
    keys = ("ignored_layers", "modules_to_not_convert")
    return _declaration(body, file, "w4afp8", scheme, ExpertsInFp8(), keys)


def parse_mlx(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise MLX's config, which has no ``quant_method``."""
    unclear: list[str] = []
    scheme = _mlx_scheme(body, body, unclear)
    entries = {
        name: _mlx_scheme(value, body, unclear) if isinstance(value, Mapping) else None
        for name, value in body.items()
        if isinstance(value, Mapping) or value is False
    }
    return _declaration(body, file, "mlx", scheme, Implied(entries), (), unclear)


_MLX = {"mxfp4": "mlx_mxfp4", "nvfp4": "mlx_nvfp4", "mxfp8": "mlx_mxfp8"}


def _mlx_scheme(raw: Mapping[str, Any], base: Mapping[str, Any], unclear: list[str]) -> Scheme:
    mode = text(raw.get("mode", base.get("mode"))) or "affine"
    bits = integer(raw.get("bits", base.get("bits")))
    group = integer(raw.get("group_size", base.get("group_size")))
    fmt: Format | None = None
    if mode in _MLX:
        fmt = FORMATS[_MLX[mode]]
    elif mode == "affine" and bits and group and bits <= 8:
        fmt = FORMATS["mlx_affine"].sized(bits=bits, block=(1, group))
    else:
        unclear.append(f"mode {mode!r} with bits {bits} and group_size {group}")
    return Scheme(fmt.algo if fmt is not None else f"MLX {mode}", fmt, "none", group_size=group)


def parse_bitsandbytes(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise bitsandbytes' config."""
    four = body.get("load_in_4bit", body.get("_load_in_4bit")) is True
    fmt = FORMATS["bnb_4bit" if four else "bnb_int8"]
    scheme = Scheme(fmt.algo, fmt, "none" if four else "dynamic")
    return _declaration(body, file, "bitsandbytes", scheme, Implied(), ("llm_int8_skip_modules",))


def parse_torchao(body: Mapping[str, Any], file: str) -> Declaration:
    """Normalise torchao's config; what its classes store is not decoded."""
    fmt = FORMATS["torchao"]
    default = mapping(mapping(body.get("quant_type")).get("default"))
    named = text(default.get("_type")) or text(body.get("quant_type"))
    scheme = Scheme(f"{fmt.algo} {named}".strip(), fmt)
    return _declaration(body, file, "torchao", scheme, Implied())
