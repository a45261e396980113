# SPDX-License-Identifier: Apache-2.0
"""Run in compressed-tensors' own interpreter: compress seeded weights, decompress them, write both
for the other side.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

FORMATS = {
    "nvfp4": ("nvfp4-pack-quantized", "NVFP4A16"),
    "mxfp4": ("mxfp4-pack-quantized", "MXFP4A16"),
    "mxfp8": ("mxfp8-quantized", "MXFP8A16"),
    "fp8": ("float-quantized", None),
    "fp8_per_channel": ("float-quantized", None),
}


def main(out: str) -> None:
    found: dict[str, np.ndarray] = {}
    generator = torch.Generator().manual_seed(7)
    for name, (kind, preset) in FORMATS.items():
        weight = torch.randn(96, 128, generator=generator) * 0.05
        weight[0, :16] = 0
        if preset is None:
            strategy = "tensor" if name == "fp8" else "channel"
            args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            low, high = (
                (weight.amin(), weight.amax())
                if name == "fp8"
                else (weight.amin(1, True), weight.amax(1, True))
            )
            shared = None
        else:
            scheme = preset_name_to_scheme(preset, ["Linear"])
            args = scheme.weights
            blocks = weight.unflatten(-1, (-1, args.group_size))
            low, high = blocks.amin(-1), blocks.amax(-1)
            shared = generate_gparam(low.min(), high.max()) if name == "nvfp4" else None
        scale, _ = calculate_qparams(low, high, args, global_scale=shared)
        state = {"weight": weight, "weight_scale": scale} | (
            {"weight_global_scale": shared} if shared is not None else {}
        )
        compressor = BaseCompressor.get_value_from_registry(kind)
        packed = {
            k: v.clone()
            for k, v in compressor.compress(state, scheme).items()
            if torch.is_tensor(v)
        }
        for leaf, tensor in packed.items():
            plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.float()
            found[f"{name}/{leaf}"] = plain.numpy()
        found[f"{name}/="] = compressor.decompress(packed, scheme)["weight"].float().numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1])
