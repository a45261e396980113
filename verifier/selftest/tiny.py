# SPDX-License-Identifier: Apache-2.0
"""Tiny clean checkpoints, made of nothing but this package: what the defects are made in.

Names and shapes come from `verifier.layouts.family`, values from a seed, codes and scales from
plain ``max`` arithmetic in numpy. They are sound, not byte-equal to any exporter's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.decoding import Float32, decode
from verifier.layouts.family import load
from verifier.reconstruction.yardstick import max_scales
from verifier.schemes import FORMATS, packed_name, role, split
from verifier.selftest.edit import CONFIG, INDEX, QUANT_CONFIG, Shard, write_shard

Dialect = Literal["modelopt", "vendor_mxfp8", "deepseek", "gptq"]
Array = npt.NDArray[Any]
Stored = dict[str, Array]
GPTQ_GROUP = 32
PRODUCER = {"name": "ckptgate-selftest", "version": "1"}
_TEXT = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **_TEXT,
        "intermediate_size": 192,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        **_TEXT,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        **_TEXT,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "minimax_m3_vl": {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "dtype": "bfloat16",
        "projector_hidden_size": 32,
        "tie_word_embeddings": False,
        "image_token_index": 3,
        "video_token_index": 4,
        "text_config": {
            **_TEXT,
            "model_type": "minimax_m3_vl_text",
            "num_hidden_layers": 3,
            "dense_intermediate_size": 192,
            "intermediate_size": 96,
            "shared_intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"],
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 1,
            "patch_size": 4,
            "image_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A clean checkpoint to be made: a family, and the format of each role (the first pattern that
    fits a module).

    ``kind`` is what corruptors are chosen by; ``shards`` above 1 comes with an index, as does
    ``index``. ``merged``: it keeps the bytes of another; ``mtp``: it has a draft head, unquantized.
    ``sizes`` replace those of the family's config.
    """

    name: str
    family: str
    kind: str
    formats: tuple[tuple[str, str], ...]
    dialect: Dialect = "modelopt"
    shards: int = 1
    index: bool = True
    merged: bool = False
    mtp: bool = False
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """A clean checkpoint on disk, with what it is judged against."""

    tiny: Tiny
    path: Path
    base: Path
    merged_from: Path | None


_LINEAR = ("routed_expert", "shared_expert", "attention", "mlp")


def _all(fmt: str) -> tuple[tuple[str, str], ...]:
    return tuple((r, fmt) for r in _LINEAR)


_EXPERTS = (("routed_expert", "nvfp4"),)
_TILES = (
    ("num_key_value_heads", 4),
    ("intermediate_size", 256),
)  # rows of k and gate that 128 divides
_MIXED = (*_EXPERTS, *((r, "mxfp8") for r in _LINEAR[1:]))
TINY: tuple[Tiny, ...] = (
    Tiny("llama-nvfp4", "llama", "nvfp4", _all("nvfp4"), index=False),
    Tiny("llama-mxfp8", "llama", "mxfp8", _all("mxfp8"), shards=2),
    Tiny("llama-fp8", "llama", "fp8", _all("fp8"), index=False),
    Tiny("llama-fp8-channel", "llama", "fp8_per_channel", _all("fp8_per_channel")),
    Tiny(
        "llama-fp8-block",
        "llama",
        "fp8_block",
        _all("fp8_block"),
        dialect="deepseek",
        shards=2,
        sizes=_TILES,
    ),
    Tiny("llama-gptq", "llama", "gptq", _all("gptq"), dialect="gptq"),
    Tiny("mixtral-nvfp4", "mixtral", "nvfp4", _EXPERTS, shards=2),
    Tiny("mixtral-w4a16", "mixtral", "w4a16_nvfp4", (("routed_expert", "w4a16_nvfp4"),)),
    Tiny("qwen3-moe-nvfp4", "qwen3_moe", "nvfp4", _EXPERTS, index=False),
    Tiny("qwen3-moe-mxfp8", "qwen3_moe", "mxfp8", _all("mxfp8"), shards=2),
    Tiny("qwen3-moe-mixed", "qwen3_moe", "mixed", _MIXED, shards=3, merged=True),
    Tiny("minimax-m3-mxfp8", "minimax_m3_vl", "mxfp8", _all("mxfp8"), shards=2, mtp=True),
    Tiny(
        "minimax-m3-vendor",
        "minimax_m3_vl",
        "vendor_mxfp8",
        _all("mxfp8"),
        dialect="vendor_mxfp8",
        shards=2,
    ),
    Tiny("minimax-m3-mixed", "minimax_m3_vl", "mixed", _MIXED, shards=2, merged=True),
)


def make(root: Path, tiny: Tiny, seed: int = 0) -> Made:
    """Write a tiny checkpoint, its BF16 base and, for a mixed one, the checkpoint it keeps bytes
    of, below ``root``.
    """
    config = copy.deepcopy(dict(CONFIGS[tiny.family])) | dict(tiny.sizes)
    values = dict(_values(config, seed))
    if tiny.mtp:
        config.get("text_config", config)["num_mtp_modules"] = 1
        values |= _mtp(int(config.get("text_config", config)["hidden_size"]), seed)
    base = _write(root / f"{tiny.name}.base", config, values, {}, None, 1)
    kept: Stored | None = None
    merged: Path | None = None
    if tiny.merged:
        vendor, kept = _encode(values, lambda module: "mxfp8" if role(module) in _LINEAR else None)
        merged = _write(root / f"{tiny.name}.kept", config, kept, vendor, "modelopt", 1)
    table = dict(tiny.formats)
    formats, tensors = _encode(
        values,
        lambda module: table.get(role(module)),
        inverse=tiny.dialect in ("vendor_mxfp8", "deepseek"),
    )
    path = _write(root / tiny.name, config, tensors, formats, tiny.dialect, tiny.shards, tiny.index)
    return Made(tiny, path, base, merged)


def _values(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of the hub layout: rows of unequal size, norms near 1, MiniMax's router in
    float32.
    """
    family = load(str(config["model_type"]))
    if family is None:
        raise ValueError(f"no layout of {config['model_type']!r}")
    rng = np.random.default_rng(seed)
    for name, shape in family.expected(config).items():
        if shape is None:
            raise ValueError(f"{name}: the config gives no shape")
        if len(shape) == 1:
            values = (1.0 if name.endswith("weight") else 0.0) + 0.1 * rng.standard_normal(shape)
        else:
            rows = np.exp2(rng.uniform(-1, 1, (shape[0], *(1 for _ in shape[1:]))))
            values = 0.05 * rows * rng.standard_normal(shape)
        wide = config["model_type"] == "minimax_m3_vl" and role(split(name)[0]) == "router"
        yield name, values.astype(np.float32 if wide else ml_dtypes.bfloat16)


def _mtp(hidden: int, seed: int) -> Stored:
    rng = np.random.default_rng(seed + 1)
    shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    return {
        f"mtp.layers.0.{k}.weight": (0.05 * rng.standard_normal(s)).astype(ml_dtypes.bfloat16)
        for k, s in shapes.items()
    }


def _encode(
    values: Mapping[str, Array], choose: Callable[[str], str | None], *, inverse: bool = False
) -> tuple[dict[str, str], Stored]:
    """Return the format of each module that was quantized, and all tensors in the order of
    ``values``.
    """
    formats = {
        split(n)[0]: fmt
        for n, v in values.items()
        if v.ndim == 2 and n.endswith(".weight") and (fmt := choose(split(n)[0])) is not None
    }
    amax: dict[str, float] = {}
    for module in formats:
        group = packed_name(module) or module
        amax[group] = max(
            amax.get(group, 0.0), float(np.abs(values[f"{module}.weight"].astype(np.float32)).max())
        )
    found: Stored = {}
    groups = list(amax)
    for name, tensor in values.items():
        module = split(name)[0]
        if not name.endswith(".weight") or module not in formats:
            found[name] = tensor
            continue
        parts = encode(
            tensor.astype(np.float32), formats[module], amax[packed_name(module) or module]
        )
        if formats[module] == "nvfp4":  # one for each fused group, as calibration on text gives
            number = groups.index(packed_name(module) or module)
            parts["input_scale"] = np.asarray(0.01 * (1 + number / len(groups)), np.float32)
        for leaf, part in parts.items():
            renamed = "weight_scale_inv" if inverse and leaf == "weight_scale" else leaf
            found[f"{module}.{renamed}"] = part
    return formats, found


def encode(values: Float32, fmt: str, amax: float | None = None) -> Stored:
    """Return a weight's parts on disk in a format, scales by ``max`` (``amax`` shared where given),
    nearest codes.
    """
    if fmt == "gptq":
        return _gptq(values)
    layout = "nvfp4" if fmt == "w4a16_nvfp4" else fmt
    parts = max_scales(values, layout, amax)
    if parts is None:
        raise ValueError("the values admit no scale")
    packed = FORMATS[fmt].packed
    units = np.full(
        (values.shape[0], values.shape[1] // (2 if packed else 1)),
        0x22 if packed else 0x38,
        np.uint8,
    )
    quotient = values / decode({**parts, "weight": units}, layout)
    if packed:
        codes = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        weight: Array = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:
        weight = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": weight, **parts}


def _gptq(values: Float32) -> Stored:
    """Return symmetric GPTQ of four bits in groups of 32, in the first version of the format."""
    out, in_ = values.shape
    groups = values.T.reshape(in_ // GPTQ_GROUP, GPTQ_GROUP, out)
    scales = (np.abs(groups).max(axis=1) / 7.5).astype(np.float16)
    steps = np.repeat(scales.astype(np.float32), GPTQ_GROUP, axis=0)
    codes = np.clip(np.rint(values.T / steps) + 8, 0, 15).astype(np.uint32)
    words = np.zeros((in_ // 8, out), np.uint32)
    for place in range(8):
        words |= codes[place::8] << np.uint32(4 * place)
    return {
        "qweight": words.view(np.int32),
        "qzeros": np.full((len(scales), out // 8), 0x77777777, np.uint32).view(np.int32),
        "scales": scales,
        "g_idx": (np.arange(in_) // GPTQ_GROUP).astype(np.int32),
    }


def _write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Stored,
    formats: Mapping[str, str],
    dialect: Dialect | None,
    shards: int,
    index: bool = False,
) -> Path:
    path.mkdir(parents=True)
    names = list(tensors)
    size = -(-len(names) // shards)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        shard = Shard({"format": "pt"})
        for name in names[i * size : (i + 1) * size]:
            array = np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape)
            shard.entries[name] = (_DTYPES[array.dtype], array.shape, array.tobytes())
            weight_map[name] = file
        write_shard(path / file, shard)
    if shards > 1 or index:
        total = sum(a.nbytes for a in tensors.values())
        _json(
            path / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    declared = dict(config)
    if dialect is not None:
        plain = sorted(
            m
            for n, a in tensors.items()
            if a.ndim >= 2 and (m := split(n)[0]) not in formats and n.endswith(".weight")
        )
        inline, nested = _DECLARE[dialect](formats, plain)
        declared["quantization_config"] = inline
        if nested is not None:
            _json(path / QUANT_CONFIG, nested)
    _json(path / CONFIG, declared)
    _json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    words = {f"w{i}": i for i in range(int(config.get("text_config", config)["vocab_size"]))}
    _json(
        path / "tokenizer.json",
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}},
    )
    _json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"},
    )
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8"
    )
    return path


_DTYPES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
Declared = tuple[dict[str, Any], dict[str, Any] | None]


def _modelopt(formats: Mapping[str, str], plain: list[str]) -> Declared:
    algos = {m: FORMATS[f] for m, f in formats.items()}
    if len(set(formats.values())) > 1:
        layers = {
            m: {"quant_algo": f.algo} | ({"group_size": f.group_size} if f.packed else {})
            for m, f in sorted(algos.items())
        }
        body: dict[str, Any] = {
            "quant_algo": "MIXED_PRECISION",
            "quant_method": "modelopt",
            "kv_cache_quant_algo": None,
            "exclude_modules": plain,
            "quantized_layers": layers,
        }
        both = {**body, "ignore": list(plain), "producer": PRODUCER}
        return both, {"producer": PRODUCER, "quant_method": "modelopt", "quantization": body}
    found = next(iter(algos.values()))
    inline: dict[str, Any] = {}
    if found.algo != "MXFP8":
        bits: dict[str, Any] = {
            "dynamic": False,
            "num_bits": 4 if found.packed else 8,
            "type": "float",
        }
        if found.packed:
            bits["group_size"] = found.group_size
        given = None if found.algo.startswith("W4A16") else dict(bits)
        inline["config_groups"] = {
            "group_0": {"input_activations": given, "weights": bits, "targets": ["Linear"]}
        }
    inline |= {
        "ignore": list(plain),
        "quant_algo": found.algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    nested: dict[str, Any] = {"quant_algo": found.algo, "kv_cache_quant_algo": None}
    if found.group_size is not None:
        nested["group_size"] = found.group_size
    nested["exclude_modules"] = plain
    return inline, {"producer": PRODUCER, "quantization": nested}


def _vendor_mxfp8(_formats: Mapping[str, str], plain: list[str]) -> Declared:
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": plain,
    }, None


def _deepseek(_formats: Mapping[str, str], plain: list[str]) -> Declared:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": plain,
    }, None


def _gptq_config(_formats: Mapping[str, str], _plain: list[str]) -> Declared:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": GPTQ_GROUP,
        "desc_act": False,
        "sym": True,
    }, None


_DECLARE: Mapping[Dialect, Callable[[Mapping[str, str], list[str]], Declared]] = {
    "modelopt": _modelopt,
    "vendor_mxfp8": _vendor_mxfp8,
    "deepseek": _deepseek,
    "gptq": _gptq_config,
}


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


__all__ = ["TINY", "Made", "Tiny", "encode", "make"]
