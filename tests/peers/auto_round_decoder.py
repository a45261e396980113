# SPDX-License-Identifier: Apache-2.0
"""Run in AutoRound's own interpreter: decode the layers of a safetensors file.

Tensors are named ``<format>/<leaf>``; the metadata holds, for each format, how it is decoded: bits,
group size, and ``awq``, ``zero`` or ``zero_less_one``. Scales are widened first, so that nothing is
rounded.
"""

from __future__ import annotations

import json
import sys

import torch
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors import safe_open
from safetensors.torch import save_file

LAYERS = {"zero": qlinear_torch.QuantLinear, "zero_less_one": qlinear_torch_zp.QuantLinear}


def gptq(parts: dict[str, torch.Tensor], bits: int, group_size: int, kind: str) -> torch.Tensor:
    """Return the weight [out, in] of a layer: what it makes of the identity."""
    width = parts["scales"].shape[0] * group_size
    out = parts["scales"].shape[1]
    layer = LAYERS[kind](bits, group_size, width, out, bias=False, g_idx="g_idx" in parts)
    for leaf, tensor in parts.items():
        setattr(layer, leaf, tensor.float() if leaf == "scales" else tensor)
    return layer(torch.eye(width)).T


def main(source: str, target: str) -> None:
    """Decode every format of ``source`` into ``target``."""
    decoded: dict[str, torch.Tensor] = {}
    with safe_open(source, "pt") as file:
        for name, text in file.metadata().items():
            bits, group_size, kind = json.loads(text)
            leaves = [key for key in file.keys() if key.startswith(f"{name}/")]
            parts = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in leaves}
            if kind == "awq":
                weight = dequantize_gemm(
                    parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, group_size
                ).T
            else:
                weight = gptq(parts, bits, group_size, kind)
            decoded[name] = weight.float().contiguous()
    save_file(decoded, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
