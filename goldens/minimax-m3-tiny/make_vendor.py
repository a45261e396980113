# SPDX-License-Identifier: Apache-2.0
"""Write the vendor-style MXFP8 checkpoint beside the BF16 one: numpy and ml_dtypes alone, none of
our packages.

    python goldens/minimax-m3-tiny/make_vendor.py goldens/minimax-m3-tiny/bf16
    goldens/minimax-m3-tiny/mxfp8

As released: language-model linears (indexer included) in E4M3 with ``weight_scale_inv`` bytes
(E8M0, one for 32 of a row); router, bias and patch embedding float32; the rest BF16. The scale is
the smallest power of two that keeps the block within 448 (OCP MX v1.0, section 6.3, rounded up).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

QUANTIZED = re.compile(
    r"^language_model\.model\.layers\.\d+\.(self_attn\.([qkvo]_proj|index_[qk]_proj)|mlp\.(gate|up|down)_proj|"
    r"block_sparse_moe\.(experts\.\d+\.w[123]|shared_experts\.(gate|up|down)_proj))\.weight$"
)
GATE = re.compile(r"^(.*\.block_sparse_moe\.gate)\.weight$")


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return name to (dtype, shape, bytes) of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        n: (
            e["dtype"],
            e["shape"],
            raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
        )
        for n, e in header.items()
    }


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file, wide elements first."""
    width = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    names = sorted(tensors, key=lambda n: (-width[tensors[n][0]], n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for n in names:
        dtype, shape, data = tensors[n]
        header[n] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(tensors[n][2] for n in names))


def mxfp8(shape: list[int], data: bytes) -> tuple[bytes, bytes]:
    """Return E4M3 codes and E8M0 scale bytes of a BF16 matrix."""
    values = (
        np.frombuffer(data, ml_dtypes.bfloat16)
        .astype(np.float64)
        .reshape(shape[0], shape[1] // 32, 32)
    )
    amax = np.abs(values).max(axis=2)
    mantissa, exponent = np.frexp(
        amax / 448.0
    )  # amax / 448 = mantissa * 2^exponent, mantissa in [0.5, 1)
    ceiling = np.where(mantissa == 0.5, exponent - 1, exponent)
    byte = np.where(amax == 0, 0, np.clip(ceiling + 127, 0, 254)).astype(np.int64)
    codes = (
        (values / np.exp2(byte - 127.0)[..., None])
        .astype(np.float32)
        .astype(ml_dtypes.float8_e4m3fn)
    )
    return codes.tobytes(), byte.astype(np.uint8).tobytes()


def main() -> None:
    """Convert every shard and write index, config and side files."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    gates: list[str] = []
    for shard in sorted(source.glob("*.safetensors")):
        result: dict[str, tuple[str, list[int], bytes]] = {}
        for name, (dtype, shape, data) in read(shard).items():
            match = GATE.match(name)
            if match:
                gates.append(match[1])
            if QUANTIZED.match(name):
                codes, scales = mxfp8(shape, data)
                result[name] = ("F8_E4M3", shape, codes)
                result[f"{name}_scale_inv"] = ("U8", [shape[0], shape[1] // 32], scales)
            else:
                result[name] = (dtype, shape, data)
        write(out / shard.name, result)
        weight_map |= dict.fromkeys(result, shard.name)
        total += sum(len(d) for _, _, d in result.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": [
            "lm_head",
            "model.embed_tokens",
            "vision_tower",
            "multi_modal_projector",
            "patch_merge_mlp",
            *sorted(gates),
        ],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copyfile(source / file, out / file)


if __name__ == "__main__":
    main()
