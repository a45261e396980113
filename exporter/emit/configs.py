# SPDX-License-Identifier: Apache-2.0
"""Both quantization declarations, made from the tensors on disk.

A uniform checkpoint is declared as ModelOpt 0.47 declares it; a mixed one as the published
nvidia/MiniMax-M3-NVFP4: one ``quantized_layers`` entry per module, ``group_size`` on NVFP4 entries
only (SGLang refuses unequal ones). 128x128 block FP8 is declared in config.json only, as
DeepSeek-V3 does: engines read nothing else of it. Exclusions are the full hub name of every
unquantized module whose weight has two dimensions or more, and of a head that has no tensor, since
engines build it. A module that an engine looks up without a name can be left unquantized only where
each quantized module is declared by itself, as in a mixed checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.layout import unstacked
from verifier import __version__
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.layouts.engine_needs import asked_names, untensored_heads
from verifier.layouts.expert_stacks import UnstackedCheckpoint
from verifier.schemes import ENGINE_NAMES, Engine, Format, Module, gather

PRODUCER = {"name": "ckptgate", "version": __version__}
KV_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def declare(
    ckpt: Checkpoint, *, kv_cache: bool = False, engines: Iterable[Engine] = ()
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return (quantization_config, hf_quant_config) for what a checkpoint's headers hold; None for
    the second where engines read none.

    Args:
        ckpt: the checkpoint, with the config that it will have: its model type decides how its
            experts are stacked.
        kv_cache: declare an FP8 KV cache also where no KV scale is on disk.
        engines: the engines that have to find every module.

    Raises:
        PlanError: a quantized module whose format cannot be inferred, or nothing quantized at all;
            a KV cache that the format cannot declare.
    """
    formats, excluded = _formats(ckpt)
    algos = {f.algo for f in formats.values()}
    if not algos:
        raise PlanError("nothing is quantized")
    needs = needs_of(formats, excluded, ckpt.config, engines)
    excluded = sorted({*excluded, *needs.excluded})
    kv_cache = kv_cache or any(n.endswith((".k_scale", ".v_scale")) for n in ckpt.tensors)
    fmt = next(iter(formats.values()))
    if len(algos) > 1 or (needs.by_module and fmt.name != "fp8_block"):
        return _mixed({**formats, **needs.renamed}, excluded, kv_cache=kv_cache)
    if fmt.name == "fp8_block":
        if kv_cache:
            raise PlanError(
                "128x128 block FP8 is declared as DeepSeek-V3 declares it, which cannot declare a "
                "KV cache"
            )
        return _block_fp8(excluded), None
    return _uniform(fmt, excluded, kv_cache=kv_cache)


@dataclass(frozen=True)
class DeclarationNeeds:
    """What a declaration needs so that engines find every module.

    Attributes:
        excluded: exclusions of modules that have no tensor, or that engines ask for by a different
            name.
        renamed: formats of quantized modules that engines ask for by a different name.
        by_module: whether each quantized module has to be declared by itself.
        notes: the reasons.
    """

    excluded: tuple[str, ...] = ()
    renamed: Mapping[str, Format] = field(default_factory=dict)
    by_module: bool = False
    notes: tuple[str, ...] = ()


def needs_of(
    formats: Mapping[str, Format],
    unquantized: Iterable[str],
    config: Mapping[str, Any] | None,
    engines: Iterable[Engine],
) -> DeclarationNeeds:
    """Return what the declaration of a checkpoint needs.

    Args:
        formats: of its quantized modules.
        unquantized: its other modules with a weight of two dimensions or more.
        config: its config.json.
        engines: who has to find them.
    """
    names, family = [*formats, *unquantized], (config or {}).get("model_type")
    heads = untensored_heads(names, config)
    excluded, renamed = list(heads), {}
    notes = [
        f"{head} is excluded by name: it has no tensor, and engines build it" for head in heads
    ]
    by_module = False
    for module in (*names, *heads):
        for name in asked_names(module, family, engines):
            if name.asked and module in formats:
                renamed[name.in_full(module)] = formats[module]
                note = f"asks for {name.stored} as {name.asked}, which is declared, too"
            elif name.asked:
                excluded.append(name.in_full(module))
                note = f"asks for {name.stored} as {name.asked}, which is excluded, too"
            else:
                by_module = True
                note = f"asks for {name.stored} without a name: modules are declared one by one"
            notes.append(f"{ENGINE_NAMES[name.engine]} {note} ({name.source})")
    return DeclarationNeeds(
        tuple(dict.fromkeys(excluded)), renamed, by_module, tuple(dict.fromkeys(notes))
    )


def _formats(ckpt: Checkpoint) -> tuple[dict[str, Format], list[str]]:
    """Return the format of each quantized module, and the unquantized modules to exclude; a stack
    of experts is one module.
    """
    formats: dict[str, Format] = {}
    excluded: list[str] = []
    view = unstacked(ckpt)
    stacks = view.stacks if isinstance(view, UnstackedCheckpoint) else ()
    experts = gather(view.tensors.values()) if stacks else {}
    for stack in stacks:
        expert = experts[stack.linears[0]]
        if expert.quantized:
            formats[stack.name] = _format(stack.name, expert)
        else:
            excluded.append(stack.name)
    stacked = {tensor.name for stack in stacks for tensor in stack.tensors.values()}
    for module in gather(t for t in ckpt.tensors.values() if t.name not in stacked).values():
        if module.quantized:
            formats[module.name] = _format(module.name, module)
        elif module.weight is not None and len(module.weight.shape) >= 2:
            excluded.append(module.name)
    return formats, excluded


def _format(name: str, module: Module) -> Format:
    fmt = module.inferred_format
    if fmt is None:
        raise PlanError(f"{name}: its quantization format cannot be inferred from its tensors")
    return fmt


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
        layers[name] = {"quant_algo": fmt.algo}
        if fmt.packed:
            layers[name]["group_size"] = fmt.group_size
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
        inline["config_groups"] = {
            "group_0": {
                "input_activations": None if fmt.algo == "W4A16_NVFP4" else dict(bits),
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
