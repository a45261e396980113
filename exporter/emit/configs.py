# SPDX-License-Identifier: Apache-2.0
"""Both quantization declarations, made from the tensors on disk.

A uniform checkpoint is declared as ModelOpt 0.47 declares it; a mixed one as the published
nvidia/MiniMax-M3-NVFP4: one ``quantized_layers`` entry for each module, ``group_size`` on NVFP4
entries only (SGLang refuses unequal ones). 128x128 block FP8 is declared in config.json only, as
DeepSeek-V3 does, for that is what engines read of it. Exclusions are the full hub name of every
unquantized module whose weight has two dimensions or more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from exporter.layout import read_stacks, unstacked
from verifier import __version__
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import Format, Module, gather

PRODUCER = {"name": "ckptgate", "version": __version__}
KV_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def declare(
    ckpt: Checkpoint, *, kv_cache: bool = False, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return (quantization_config, hf_quant_config) for what a checkpoint's headers show; no second
    where none is read.

    Args:
        ckpt: what was written.
        kv_cache: declare an FP8 KV cache also where no KV scale is on disk.
        config: the config that will stand beside it, which tells how its experts are stacked.

    Raises:
        PlanError: a quantized module whose format cannot be told, or nothing quantized at all; a KV
            cache that the format has no declaration of.
    """
    formats: dict[str, Format] = {}
    excluded: list[str] = []
    stacked = read_stacks(ckpt, config)
    within = stacked.names if stacked is not None else frozenset()
    each = gather(unstacked(ckpt, config).tensors.values()) if stacked is not None else {}
    for stack in stacked.stacks if stacked is not None else ():
        member = each[stack.members[0]]
        if not member.quantized:
            excluded.append(stack.name)
        elif member.inferred_format is None:
            raise PlanError(
                f"{stack.name}: quantized, and its format cannot be told from its tensors"
            )
        else:
            formats[stack.name] = member.inferred_format
    for module in gather(t for t in ckpt.tensors.values() if t.name not in within).values():
        if module.quantized:
            shown = module.inferred_format
            if shown is None:
                raise PlanError(
                    f"{module.name}: quantized, and its format cannot be told from its tensors"
                )
            formats[module.name] = shown
        elif _multidimensional(module):
            excluded.append(module.name)
    algos = {f.algo for f in formats.values()}
    if not algos:
        raise PlanError("nothing is quantized")
    excluded.sort()
    kv_cache = kv_cache or any(
        t.name.endswith((".k_scale", ".v_scale")) for t in ckpt.tensors.values()
    )
    if len(algos) > 1:
        return _mixed(formats, excluded, kv_cache=kv_cache)
    fmt = next(iter(formats.values()))
    if fmt.name == "fp8_block":
        if kv_cache:
            raise PlanError(
                "128x128 block FP8 is declared as DeepSeek-V3 does, which says nothing of a KV cache"
            )
        return _block_fp8(excluded), None
    return _uniform(fmt, excluded, kv_cache=kv_cache)


def _multidimensional(module: Module) -> bool:
    return module.weight is not None and len(module.weight.shape) >= 2


def _block_fp8(excluded: list[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": excluded,
    }


def _mixed(
    formats: Mapping[str, Format], excluded: list[str], *, kv_cache: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for name in sorted(formats):
        fmt = formats[name]
        layers[name] = {"quant_algo": fmt.algo} | (
            {"group_size": fmt.group_size} if fmt.packed else {}
        )
    body: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt",
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        "exclude_modules": excluded,
        "quantized_layers": layers,
    }
    inline = {**body, "ignore": excluded, "producer": PRODUCER}
    if kv_cache:
        inline["kv_cache_scheme"] = KV_SCHEME  # vLLM reads no other field here
    return inline, {"producer": PRODUCER, "quant_method": "modelopt", "quantization": body}


def _uniform(
    fmt: Format, excluded: list[str], *, kv_cache: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    inline: dict[str, Any] = {}
    if fmt.algo != "MXFP8":  # ModelOpt 0.47 writes no config_groups for MXFP8
        bits: dict[str, Any] = {
            "dynamic": False,
            "num_bits": 4 if fmt.packed else 8,
            "type": "float",
        }
        if fmt.packed:
            bits["group_size"] = fmt.group_size
        quantized_input = None if fmt.algo == "W4A16_NVFP4" else dict(bits)
        inline["config_groups"] = {
            "group_0": {
                "input_activations": quantized_input,
                "weights": dict(bits),
                "targets": ["Linear"],
            }
        }
    inline |= {
        "ignore": excluded,
        "quant_algo": fmt.algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    if kv_cache:
        inline["kv_cache_scheme"] = KV_SCHEME
    body: dict[str, Any] = {
        "quant_algo": fmt.algo,
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
    }
    if fmt.group_size is not None:
        body["group_size"] = fmt.group_size
    body["exclude_modules"] = excluded
    return inline, {"producer": PRODUCER, "quantization": body}


def with_quantization(config: Mapping[str, Any], inline: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with only ``quantization_config`` replaced."""
    result = copy.deepcopy(dict(config))
    result["quantization_config"] = dict(inline)
    text = result.get("text_config")
    if isinstance(text, dict):
        text.pop("quantization_config", None)
    return result
