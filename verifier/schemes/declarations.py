# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's quantization configs, in one shape whatever the dialect.

Dialects: ModelOpt flat and nested; ``fp8`` and ``mxfp8`` by themselves; compressed-tensors; GPTQ;
AWQ; AutoRound; Quark; MXFP4 (gpt-oss); FBGEMM; W4AFP8; MLX; bitsandbytes; torchao. Others are
``foreign``: `Declaration.known` is False and ``method`` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.checkpoint.header import read_json
from verifier.schemes.declared import Declaration, Declarations, DeclaredFormat
from verifier.schemes.dialects import compressed_tensors, integers, modelopt, others, quark
from verifier.schemes.dialects.common import text
from verifier.schemes.formats import Format, same_layout
from verifier.schemes.modules import Module

OWN_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files in which AutoGPTQ, AutoAWQ and AutoRound keep the config where config.json has none."""
_BY_METHOD: dict[str, Callable[[Mapping[str, Any], str], Declaration]] = {
    "gptq": integers.parse_gptq,
    "awq": integers.parse_awq,
    "auto-round": integers.parse_auto_round,
    "inc": integers.parse_auto_round,
    "quark": quark.parse,
    "mxfp4": others.parse_mxfp4,
    "fbgemm_fp8": others.parse_fbgemm,
    "w4afp8": others.parse_w4afp8,
    "bitsandbytes": others.parse_bitsandbytes,
    "torchao": others.parse_torchao,
}


def read_declarations(checkpoint: Checkpoint) -> Declarations:
    """Return the declarations of a checkpoint's configs."""
    config = checkpoint.config or {}
    inline, file = inline_declaration(config), "config.json"
    if inline is None and checkpoint.hf_quant_config is None:
        inline, file = _own_file(checkpoint)
    nested = checkpoint.hf_quant_config
    return Declarations(
        parse(inline, file, config) if inline is not None else None,
        parse(nested, "hf_quant_config.json") if nested is not None else None,
    )


def inline_declaration(config: Mapping[str, Any]) -> Any:
    """Return what config.json, or its text part, holds as quantization config; None for nothing."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                return part[key]
    return config.get("quantization")


def _own_file(checkpoint: Checkpoint) -> tuple[Any, str]:
    for name in OWN_FILES:
        size = checkpoint.files.get(name)
        if size is not None:
            value, _ = read_json(checkpoint.source, name, size)
            if isinstance(value, Mapping) and ("bits" in value or "w_bit" in value):
                method = "gptq" if name == "quantize_config.json" else "awq"
                return {"quant_method": method} | dict(value), name
    return None, "config.json"


def format_of(module: Module, declaration: Declaration | None) -> Format | None:
    """Return the format that a quantized module must satisfy: the declared one, else the one that
    it shows.

    None where it is not quantized, where its tensors show a format other than the declared one
    (QC305, QC408, QC410), or where the format that is declared is not known.
    """
    known = declaration is not None and declaration.known
    return fitting(module, declaration.declared_for(module.name) if known and declaration else None)


def declared_formats(declaration: Declaration | None) -> Callable[[str], Format | None] | None:
    """Return the declared format of a module by name, for `gather`; None without a declaration."""
    if declaration is None or not declaration.known:
        return None
    return lambda module: declaration.declared_for(module).format


def fitting(module: Module, cover: DeclaredFormat | None) -> Format | None:
    """Return `format_of` a module where what the declaration says about it is known already."""
    if not module.quantized or module.weight is None or module.dims is None:
        return None
    shown = module.inferred_format
    declared = (cover.format if cover is not None and cover.algo is not None else None) or shown
    if declared is None or module.weight.dtype not in declared.weight.dtypes:
        return None
    if shown is None:
        return declared
    if declared.name == shown.name:
        return shown  # with the parameters that the tensors have: rules compare the declared ones
    return declared if same_layout(declared, shown) else None


def parse(raw: Any, file: str, config: Mapping[str, Any] | None = None) -> Declaration:
    """Normalise one declaration; what is malformed is listed in ``problems``, never raised.

    Args:
        raw: the quantization config.
        file: the file that holds it.
        config: the whole config.json, where it is in one.
    """
    if not isinstance(raw, Mapping):
        problem = f"is a {type(raw).__name__}, not an object"
        return Declaration(file, "foreign", "", None, problems=(problem,))
    nested = raw.get("quantization")
    body = nested if isinstance(nested, Mapping) else raw
    method = text(raw.get("quant_method")) or text(body.get("quant_method"))
    if method == "compressed-tensors":
        return compressed_tensors.parse(body, file, config)
    if method in ("fp8", "mxfp8"):
        return modelopt.parse_fp8(body, file, config)
    if method in _BY_METHOD:
        return _BY_METHOD[method](body, file)
    if method.startswith("modelopt") or "quant_algo" in body:
        return modelopt.parse(raw, body, file)
    if not method and "bits" in body and "group_size" in body:
        return others.parse_mlx(body, file)
    problems = ("names no quant_method",) if body and not method else ()
    return Declaration(file, "foreign", method, None, problems=problems)
