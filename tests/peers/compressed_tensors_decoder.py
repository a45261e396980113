# SPDX-License-Identifier: Apache-2.0
"""Run in compressed-tensors' own interpreter: decode the layers of a safetensors file.

Tensors are named ``<format>/<leaf>``; the metadata holds, for each format, the name of a compressor
and the scheme, as JSON. Scales in half precision are widened first, so that nothing is rounded.
"""

from __future__ import annotations

import json
import sys

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import save_file

HALVES = (torch.bfloat16, torch.float16)


def awq(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a layer of AutoAWQ as this package's own integers."""
    named = {f"layer.{leaf}": tensor for leaf, tensor in parts.items()}
    converted = AutoAWQConverter(ignore=[], targets=["Linear"]).process(named)
    return {name.removeprefix("layer."): tensor for name, tensor in converted.items()}


def main(source: str, target: str) -> None:
    """Decode every format of ``source`` into ``target``."""
    decoded: dict[str, torch.Tensor] = {}
    with safe_open(source, "pt") as file:
        for name, text in file.metadata().items():
            kind, scheme = json.loads(text)
            leaves = [key for key in file.keys() if key.startswith(f"{name}/")]
            parts = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in leaves}
            wide = {k: v.float() if v.dtype in HALVES else v for k, v in parts.items()}
            if "qweight" in wide:
                wide = awq(wide)
            compressor = BaseCompressor.get_value_from_registry(kind)
            state = compressor.decompress(wide, QuantizationScheme(**scheme))
            decoded[name] = state["weight"].float().contiguous()
    save_file(decoded, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
