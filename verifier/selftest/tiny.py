# SPDX-License-Identifier: Apache-2.0
"""TinySpec valid checkpoints, made by this package alone, in which defects are injected.

Names and shapes come from `verifier.layouts.family`, values from a seed, quantized values and
scales from plain ``max`` arithmetic in numpy. They are valid, but not byte-equal to any exporter's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.decoding import Float32, decode
from verifier.layouts.family import load
from verifier.reconstruction.yardstick import max_scales
from verifier.schemes import FORMATS, Format, packed_name, role, split
from verifier.selftest.editor import CONFIG, INDEX, QUANT_CONFIG, RawShard, write_shard

Dialect = Literal["modelopt", "vendor_mxfp8", "deepseek", "gptq"]
Array = npt.NDArray[Any]
Tensors = dict[str, Array]
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
            "shared_intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_index_dim": 32,
                "sparse_num_index_heads": 2,
                "sparse_attention_freq": [0, 0, 1],
            },
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 1,
            "patch_size": 4,
            "image_size": 16,
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
    },
}


@dataclass(frozen=True, slots=True)
class TinySpec:
    """A valid checkpoint to make.

    Attributes:
        name: of its directory.
        family: its model type, a key of `CONFIGS`.
        kind: selects the defects that suit it.
        formats: (role, format) pairs; other roles stay unquantized.
        dialect: of its declaration.
        shards: several come with an index.
        index: whether a single shard has one, too.
        merged: whether it keeps the bytes of an overlay checkpoint.
        mtp: whether it has an unquantized draft head.
        tied: whether its head is tied to the embedding, and so has no tensor.
        sizes: replace sizes of the family's config.
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
    tied: bool = False
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """A valid checkpoint on disk, and what to compare it with."""

    spec: TinySpec
    path: Path
    base: Path
    merged_from: Path | None


@dataclass(frozen=True, slots=True)
class Content:
    """The tensors of a checkpoint, and the format of each quantized module."""

    tensors: Tensors
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def unquantized(self) -> list[str]:
        """The names of the unquantized modules with a weight of two or more dimensions, sorted."""
        weights = [n for n, a in self.tensors.items() if a.ndim >= 2 and n.endswith(".weight")]
        return sorted({split(n)[0] for n in weights} - self.formats.keys())


_LINEAR = ("routed_expert", "shared_expert", "attention", "indexer", "mlp")


def _all(fmt: str) -> tuple[tuple[str, str], ...]:
    return tuple((r, fmt) for r in _LINEAR)


_EXPERTS = (("routed_expert", "nvfp4"),)
# The rows of k and gate are multiples of 128.
_TILES = (("num_key_value_heads", 4), ("intermediate_size", 256))
_MIXED = (*_EXPERTS, *((r, "mxfp8") for r in _LINEAR[1:]))
TINY: tuple[TinySpec, ...] = (
    TinySpec("llama-nvfp4", "llama", "nvfp4", _all("nvfp4"), index=False),
    TinySpec("llama-mxfp8", "llama", "mxfp8", _all("mxfp8"), shards=2),
    TinySpec("llama-fp8", "llama", "fp8", _all("fp8"), index=False),
    TinySpec("llama-fp8-channel", "llama", "fp8_per_channel", _all("fp8_per_channel")),
    TinySpec(
        "llama-fp8-block",
        "llama",
        "fp8_block",
        _all("fp8_block"),
        dialect="deepseek",
        shards=2,
        sizes=_TILES,
    ),
    TinySpec("mixtral-nvfp4", "mixtral", "nvfp4", _EXPERTS, shards=2),
    TinySpec("mixtral-w4a16", "mixtral", "w4a16_nvfp4", (("routed_expert", "w4a16_nvfp4"),)),
    TinySpec("qwen3-moe-nvfp4", "qwen3_moe", "nvfp4", _EXPERTS, index=False),
    TinySpec("qwen3-moe-tied", "qwen3_moe", "nvfp4", _EXPERTS, tied=True),
    TinySpec("qwen3-moe-mxfp8", "qwen3_moe", "mxfp8", _all("mxfp8"), shards=2),
    TinySpec("qwen3-moe-mixed", "qwen3_moe", "mixed", _MIXED, shards=3, merged=True),
    TinySpec("minimax-m3-mxfp8", "minimax_m3_vl", "mxfp8", _all("mxfp8"), shards=2, mtp=True),
    TinySpec(
        "minimax-m3-vendor",
        "minimax_m3_vl",
        "vendor_mxfp8",
        _all("mxfp8"),
        dialect="vendor_mxfp8",
        shards=2,
    ),
    TinySpec("minimax-m3-mixed", "minimax_m3_vl", "mixed", _MIXED, shards=2, merged=True),
    TinySpec("llama-gptq", "llama", "gptq", _all("gptq"), dialect="gptq"),
)

_OVERLAY = TinySpec("overlay", "", "mxfp8", (), index=False)


def make(root: Path, spec: TinySpec, seed: int = 0) -> TinyCheckpoint:
    """Write a tiny checkpoint, its BF16 base and, for a merged one, its overlay, below ``root``."""
    config = copy.deepcopy(dict(CONFIGS[spec.family])) | dict(spec.sizes)
    if spec.tied:
        config["tie_word_embeddings"] = True
    values = dict(_values(config, seed))
    if spec.mtp:
        text = config.get("text_config", config)
        text["num_mtp_modules"] = 1
        values |= _mtp(int(text["hidden_size"]), seed)
    base = _write(root / f"{spec.name}.base", config, Content(values))
    overlay = None
    if spec.merged:
        mxfp8 = _encode(values, dict(_all("mxfp8")))
        overlay = _write(root / f"{spec.name}.kept", config, mxfp8, _OVERLAY)
    content = _encode(
        values, dict(spec.formats), inverse=spec.dialect in ("vendor_mxfp8", "deepseek")
    )
    path = _write(root / spec.name, config, content, spec)
    return TinyCheckpoint(spec, path, base, overlay)


def _values(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of the Hub layout: rows of unequal size, norms near 1, MiniMax's router in
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


def _mtp(hidden: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed + 1)
    shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    return {
        f"mtp.layers.0.{leaf}.weight": (0.05 * rng.standard_normal(shape)).astype(
            ml_dtypes.bfloat16
        )
        for leaf, shape in shapes.items()
    }


def _encode(
    values: Mapping[str, Array], format_of_role: Mapping[str, str], *, inverse: bool = False
) -> Content:
    """Return the tensors with the 2-D weights of some roles quantized, in the order of ``values``.

    ``inverse``: block scales are named ``weight_scale_inv``.
    """
    formats: dict[str, str] = {}
    amax: dict[str, float] = {}  # by fused group, which shares its scale
    for name, tensor in values.items():
        module = split(name)[0]
        fmt = format_of_role.get(role(module))
        if fmt is not None and tensor.ndim == 2 and name.endswith(".weight"):
            formats[module] = fmt
            group = packed_name(module) or module
            largest = float(np.abs(tensor.astype(np.float32)).max())
            amax[group] = max(amax.get(group, 0.0), largest)
    groups = list(amax)
    tensors: Tensors = {}
    for name, tensor in values.items():
        module = split(name)[0]
        if not name.endswith(".weight") or module not in formats:
            tensors[name] = tensor
            continue
        group = packed_name(module) or module
        parts = encode(tensor.astype(np.float32), formats[module], amax[group])
        if formats[module] in ("nvfp4", "fp8"):  # one per fused group, as calibration on text gives
            scale = 0.01 * (1 + groups.index(group) / len(groups))
            parts["input_scale"] = np.asarray(scale, np.float32)
        for leaf, part in parts.items():
            stored = "weight_scale_inv" if inverse and leaf == "weight_scale" else leaf
            tensors[f"{module}.{stored}"] = part
    return Content(tensors, formats)


def encode(values: Float32, fmt: str, amax: float | None = None) -> Tensors:
    """Return the stored tensors of a weight by leaf: scales by ``max``, nearest values.

    ``amax`` is shared with other weights where given.
    """
    if fmt == "gptq":
        return _gptq(values)
    layout = "nvfp4" if fmt == "w4a16_nvfp4" else fmt
    parts = max_scales(values, layout, amax)
    if parts is None:
        raise ValueError("the values admit no scale")
    packed = FORMATS[fmt].packed
    rows, columns = values.shape
    if packed:
        ones = np.full((rows, columns // 2), 0x22, np.uint8)
    else:
        ones = np.full((rows, columns), 0x38, np.uint8)
    quotient = values / decode({**parts, "weight": ones}, layout)
    if packed:
        codes = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        weight: Array = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:
        weight = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": weight, **parts}


def _gptq(values: Float32) -> Tensors:
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
    path: Path, config: Mapping[str, Any], content: Content, spec: TinySpec | None = None
) -> Path:
    """Write a checkpoint; without a spec it is unquantized, in one shard and without an index."""
    path.mkdir(parents=True)
    shards = spec.shards if spec else 1
    weight_map = _write_shards(path, content.tensors, shards)
    if spec and (spec.index or shards > 1):
        total = sum(a.nbytes for a in content.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(path / INDEX, index)
    declared = dict(config)
    if spec:
        plain = sorted([*content.unquantized, "lm_head"]) if spec.tied else content.unquantized
        inline, nested = _DECLARE[spec.dialect](content.formats, plain)
        declared["quantization_config"] = inline
        if nested is not None:
            _write_json(path / QUANT_CONFIG, nested)
    _write_json(path / CONFIG, declared)
    _write_auxiliary_files(path, int(config.get("text_config", config)["vocab_size"]))
    return path


def _write_shards(path: Path, tensors: Tensors, count: int) -> dict[str, str]:
    """Write the tensors to a number of shards, and return the file of each."""
    names = list(tensors)
    size = -(-len(names) // count)
    weight_map: dict[str, str] = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        shard = RawShard({"format": "pt"})
        for name in names[i * size : (i + 1) * size]:
            array = np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape)
            shard.entries[name] = (_DTYPES[array.dtype], array.shape, array.tobytes())
            weight_map[name] = file
        write_shard(path / file, shard)
    return weight_map


def _write_auxiliary_files(path: Path, vocab_size: int) -> None:
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    vocabulary = {f"w{i}": i for i in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    _write_json(path / "tokenizer.json", {"version": "1.0", "model": model})
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    _write_json(path / "tokenizer_config.json", tokenizer)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")


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
    names = set(formats.values())
    if len(names) > 1:
        return _modelopt_mixed(formats, plain)
    return _modelopt_uniform(FORMATS[names.pop()], plain)


def _modelopt_mixed(formats: Mapping[str, str], plain: list[str]) -> Declared:
    layers: dict[str, Any] = {}
    for module, name in sorted(formats.items()):
        fmt = FORMATS[name]
        group_size = {"group_size": fmt.group_size} if fmt.packed else {}
        layers[module] = {"quant_algo": fmt.algo} | group_size
    body: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt",
        "kv_cache_quant_algo": None,
        "exclude_modules": plain,
        "quantized_layers": layers,
    }
    inline = {**body, "ignore": list(plain), "producer": PRODUCER}
    return inline, {"producer": PRODUCER, "quant_method": "modelopt", "quantization": body}


def _modelopt_uniform(fmt: Format, plain: list[str]) -> Declared:
    inline: dict[str, Any] = {}
    if fmt.algo != "MXFP8":
        weights: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
        if fmt.packed:
            weights |= {"num_bits": 4, "group_size": fmt.group_size}
        activations = None if fmt.algo.startswith("W4A16") else dict(weights)
        group = {"input_activations": activations, "weights": weights, "targets": ["Linear"]}
        inline["config_groups"] = {"group_0": group}
    inline |= {
        "ignore": list(plain),
        "quant_algo": fmt.algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    nested: dict[str, Any] = {"quant_algo": fmt.algo, "kv_cache_quant_algo": None}
    if fmt.group_size is not None:
        nested["group_size"] = fmt.group_size
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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


__all__ = ["TINY", "TinyCheckpoint", "TinySpec", "encode", "make"]
