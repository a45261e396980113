# SPDX-License-Identifier: Apache-2.0
"""The real MiniMax-M3 checkpoints as sparse files, from the published tensor table: full headers,
no weights.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from tests.paths import TESTS

TABLE = TESTS / "data" / "minimax-m3-tensors.json"
DTYPES = {
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "uint8": ("U8", 1),
}
Row = tuple[str, str, tuple[int, ...]]


def rows() -> list[Row]:
    """Return (name, dtype, shape) of the vendor's MXFP8 checkpoint."""
    table = json.loads(TABLE.read_text())
    found: list[Row] = []
    for pattern, shape, dtype, count in table["tensors"]:
        names = [pattern]
        for choice in re.findall(r"\{([^{}]+)\}", pattern):
            names = [n.replace("{" + choice + "}", c, 1) for n in names for c in choice.split(",")]
        expanded = []
        for name in names:
            ranges = re.findall(r"(?<=\.)(\d+)-(\d+)(?=\.)", name)
            if name.startswith("layers."):
                name = "language_model.model." + name
            for numbers in itertools.product(*(range(int(a), int(b) + 1) for a, b in ranges)):
                text = name
                for (a, b), i in zip(ranges, numbers, strict=True):
                    text = text.replace(f".{a}-{b}.", f".{i}.", 1)
                expanded.append(text)
        assert len(expanded) == count, (pattern, len(expanded), count)
        found += [(n, DTYPES[dtype][0], tuple(shape)) for n in expanded]
    return found


def bf16(vendor: list[Row]) -> list[Row]:
    """Return the BF16 checkpoint that the vendor's was made from."""
    scales = {n for n, _, _ in vendor if n.endswith(".weight_scale_inv")}
    quantized = {n.removesuffix("_scale_inv") for n in scales}
    return [(n, "BF16" if n in quantized else d, s) for n, d, s in vendor if n not in scales]


def mixed(vendor: list[Row]) -> list[Row]:
    """Return the mixed release: routed experts in NVFP4 with four tensors each."""
    found: list[Row] = []
    for name, dtype, shape in vendor:
        if ".experts." not in name or ".shared_experts" in name:
            found.append((name, dtype, shape))
        elif name.endswith(".weight"):
            out, in_ = shape
            module = name.removesuffix(".weight")
            found += [
                (name, "U8", (out, in_ // 2)),
                (f"{module}.weight_scale", "F8_E4M3", (out, in_ // 16)),
                (f"{module}.weight_scale_2", "F32", ()),
                (f"{module}.input_scale", "F32", ()),
            ]
    return found


def write(folder: Path, tensors: list[Row], config: dict[str, object], shards: int) -> Path:
    """Write sparse shards, index and config.json; a file's data range takes no space on disk."""
    folder.mkdir(parents=True)
    size = {d: s for d, s in DTYPES.values()}
    weight_map = {}
    total = 0
    step = -(-len(tensors) // shards)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in tensors[i * step : (i + 1) * step]:
            nbytes = size[dtype]
            for s in shape:
                nbytes *= s
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
            weight_map[name] = file
        raw = json.dumps(header, separators=(",", ":")).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(raw).to_bytes(8, "little") + raw)
            handle.truncate(8 + len(raw) + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def m3_config() -> dict[str, object]:
    """Return a MiniMax-M3 config of the released sizes; every other value is transformers'
    default.
    """
    sparse = [0] * 3 + [1] * 57
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "text_config": {
            "hidden_size": 6144,
            "num_hidden_layers": 60,
            "num_local_experts": 128,
            "vocab_size": 200064,
            "moe_layer_freq": sparse,
            "sparse_attention_config": {"sparse_attention_freq": sparse},
        },
        "vision_config": {
            "hidden_size": 1280,
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        "projector_hidden_size": 6144,
    }


def vendor_quantization() -> dict[str, object]:
    """Return the quantization_config of the vendor's checkpoint."""
    gates = [f"language_model.model.layers.{i}.block_sparse_moe.gate" for i in range(3, 60)]
    ignored = [
        "lm_head",
        "model.embed_tokens",
        "vision_tower",
        "multi_modal_projector",
        "patch_merge_mlp",
        *gates,
    ]
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": ignored,
    }


def release_quantization(tensors: list[Row]) -> dict[str, object]:
    """Return the declaration of the mixed release for these tensors."""
    layers: dict[str, dict[str, object]] = {}
    for name, dtype, _ in tensors:
        module = name.rpartition(".")[0]
        if name.endswith(".weight") and dtype == "U8":
            layers[module] = {"quant_algo": "NVFP4", "group_size": 16}
        elif name.endswith(".weight") and dtype == "F8_E4M3":
            layers[module] = {"quant_algo": "MXFP8"}
    vendor = vendor_quantization()["ignored_layers"]
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": vendor,
        "quantized_layers": layers,
        "quant_method": "modelopt",
    }
