# SPDX-License-Identifier: Apache-2.0
"""Round activations to what a format would hand to the matrix product, on any device.

Each function takes [..., in] of any floating dtype, computes in float32, and returns the rounded
values in the dtype that it was given (BF16 in a model: products with a scale are rounded once more,
as ModelOpt's own simulation rounds them). The rules are those of the weights: OCP Microscaling v1.0
with the exponent rounded up, ModelOpt 0.47 for NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["nvfp4", "mxfp8", "fp8", "fp8_token", "fp8_group"]
E4M3_MAX, E2M1_MAX, SMALLEST_SCALE = 448.0, 6.0, 2.0**-9
NVFP4_BLOCK, MXFP8_BLOCK, FP8_GROUP = 16, 32, 128


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to E4M3 within [-448, 448], ties to even; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to E2M1 within [-6, 6], ties to the even code; NaN stays
    NaN.
    """
    size = x.abs().clamp(max=E2M1_MAX)
    fine, middle, coarse = (size * 2).round() / 2, size.round(), (size / 2).round() * 2
    return torch.where(size < 2, fine, torch.where(size < 4, middle, coarse)).copysign(x)


def nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Round in blocks of 16: the block's scale is E4M3 of amax / (6 * ``scale``), at least 2^-9.

    Args:
        x: activations.
        scale: the module's input_scale, amax / 2688 of calibration; what a block exceeds it by is
            cut off.
    """
    blocks, width = _blocks(x, NVFP4_BLOCK)
    whole = torch.tensor(scale, dtype=torch.float32, device=x.device)
    ideal = blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * whole)
    shared = e4m3(ideal.clamp(min=SMALLEST_SCALE))
    combined = torch.where(ideal == 0, 1.0, shared) * whole
    return _joined(e2m1(blocks / combined) * combined, x, width)


def mxfp8(x: torch.Tensor) -> torch.Tensor:
    """Round in blocks of 32 to E4M3 times the least power of two that holds the block's largest
    magnitude.
    """
    blocks, width = _blocks(x, MXFP8_BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True)
    # Exact, where log2 in float32 is one too low just above 448 * 2^k: 448 is 1.75 * 2^8, so round
    # the mantissa up there.
    exponent = (((amax.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp(0, 254) - 127
    return _joined(_times_power(e4m3(_times_power(blocks, -exponent)), exponent), x, width)


def fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Round to E4M3 times ``scale``, the module's input_scale."""
    whole = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return (e4m3(x.float() / whole) * whole).to(x.dtype)


def fp8_token(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 with a scale for each position, amax / 448."""
    return _by_amax(x.float()).to(x.dtype)


def fp8_group(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 with a scale for each 128 values of a position, amax / 448, as DeepSeek-V3's
    block FP8 does.
    """
    blocks, width = _blocks(x, FP8_GROUP)
    return _joined(_by_amax(blocks), x, width)


def _by_amax(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return e4m3(x / scale) * scale


def _times_power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return x * 2^exponent for exponents of -127 to 127, in two steps: neither power is
    subnormal.
    """
    half = exponent >> 1
    return x * _power(half) * _power(exponent - half)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    # From its bits: exp2 is exact on no device by contract.
    return ((exponent + 127) << 23).view(torch.float32)


def _blocks(x: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    """Return float32 [..., blocks, size], the last block filled up with zeros, and the width
    without them.
    """
    width = x.shape[-1]
    values = torch.nn.functional.pad(x.float(), (0, -width % size))
    return values.reshape(*x.shape[:-1], -1, size), width


def _joined(blocks: torch.Tensor, like: torch.Tensor, width: int) -> torch.Tensor:
    return blocks.flatten(-2)[..., :width].to(like.dtype)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a module's input is rounded; ``scale`` is its input_scale where the kind has one."""

    kind: Kind
    scale: float = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input as the format hands it on."""
        if self.kind == "nvfp4":
            return nvfp4(x, self.scale)
        return fp8(x, self.scale) if self.kind == "fp8" else _DYNAMIC[self.kind](x)


_DYNAMIC: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mxfp8": mxfp8,
    "fp8_token": fp8_token,
    "fp8_group": fp8_group,
}
