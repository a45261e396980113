# SPDX-License-Identifier: Apache-2.0
"""What the base's weights are after plain rounding to the candidate's formats, and how far the
candidate's weights are from the base's in comparison.

Plain rounding (`verifier.reconstruction.yardstick.by_max`) is the format's norm: what the format
costs on these weights when nothing is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from verifier.checkpoint import Checkpoint
from verifier.decoding import Float32
from verifier.layouts.expert_stacks import unstacked
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.yardstick import by_max, is_compared
from verifier.schemes import Format, Module, canonical, fused_groups

WINDOW = 16
"""Columns of a block where the format has none."""


@dataclass(frozen=True, slots=True)
class WeightNoise:
    """How far a module's weight is from the base's.

    ``sqnr`` and ``expected`` are signal-to-quantization-noise ratios in dB, of the candidate and of
    plain rounding to its format; infinite where nothing differs. ``row`` and ``block`` are where
    the candidate's error exceeds that of plain rounding most.
    """

    module: str
    tensor: str
    format: str
    sqnr: float
    expected: float
    row: int
    block: int

    @property
    def loss(self) -> float:
        """By how many dB the weight is noisier than plain rounding; 0 where neither has noise."""
        if math.isinf(self.expected) and math.isinf(self.sqnr):
            return 0.0
        return self.expected - self.sqnr


class SoundWeights:
    """Rounds weights of the base as the candidate's formats do, and notes the candidate's noise.

    An instance is a `verifier.load.model.Change` of the base.
    """

    def __init__(self, base: Checkpoint, candidate: Checkpoint) -> None:
        self._base = QuantizedCheckpoint(unstacked(base))
        self._candidate = QuantizedCheckpoint(unstacked(candidate))
        self.noise: dict[str, WeightNoise] = {}

    @cached_property
    def rounded(self) -> frozenset[str]:
        """The hub names of weights that the candidate quantizes."""
        return frozenset(f"{name}.weight" for name in self._formats)

    @cached_property
    def _formats(self) -> dict[str, tuple[Module, Format]]:
        return {_hub(m): (m, fmt) for m, fmt in self._candidate.formatted if is_compared(fmt)}

    @cached_property
    def _modules(self) -> dict[str, Module]:
        return {_hub(m): m for m in self._candidate.modules.values() if m.weight is not None}

    @cached_property
    def _fused(self) -> dict[str, tuple[str, ...]]:
        """The modules whose weights share a scale, by each one's hub name."""
        groups = fused_groups(self._formats)
        return {member: members for _, members in groups for member in members}

    def __call__(self, module: str, values: torch.Tensor) -> torch.Tensor:
        """Return a weight of the base as the candidate's format has it after plain rounding."""
        name = (canonical(f"{module}.weight") or module).removesuffix(".weight")
        stored = self._modules.get(name)
        if stored is None:
            return values
        base = values.float().numpy()
        pair = self._formats.get(name)
        plain = self._rounded(name, base, *pair) if pair is not None else base
        self._note(name, stored, pair[1] if pair else None, base, plain)
        return torch.from_numpy(plain).to(values.dtype) if pair is not None else values

    def _rounded(self, name: str, base: Float32, module: Module, fmt: Format) -> Float32:
        scales = {
            leaf: self._candidate.checkpoint.array(t)
            for leaf, t in module.parts.items()
            if t is not module.weight
        }
        if module.weight is not None:
            scales["weight"] = self._candidate.checkpoint.array(module.weight)
        result = by_max(base, scales, fmt, self._largest(name, fmt))
        return base if result is None else result

    def _largest(self, name: str, fmt: Format) -> float | None:
        """Return the largest magnitude of the weights that share a tensor's scale."""
        members = self._fused.get(name, ())
        if not (fmt.packed or fmt.name == "fp8") or len(members) < 2:
            return None
        values = [self._base.values(m) for n, m in self._base_modules.items() if n in members]
        return max((float(np.abs(v).max(initial=0)) for v in values if v is not None), default=None)

    @cached_property
    def _base_modules(self) -> dict[str, Module]:
        return {_hub(m): m for m in self._base.modules.values() if m.weight is not None}

    def _note(
        self, name: str, module: Module, fmt: Format | None, base: Float32, plain: Float32
    ) -> None:
        stored = self._candidate.values(module)
        if stored is None or stored.shape != base.shape or module.weight is None:
            return
        row, block = _worst_block(stored - base, plain - base, fmt)
        self.noise[name] = WeightNoise(
            name,
            module.weight.name,
            fmt.algo if fmt is not None else module.weight.dtype,
            sqnr(base, stored),
            sqnr(base, plain),
            row,
            block,
        )


def _hub(module: Module) -> str:
    return (canonical(f"{module.name}.weight") or module.name).removesuffix(".weight")


def sqnr(signal: Float32, noisy: Float32) -> float:
    """Return the signal-to-quantization-noise ratio in dB; infinite without noise, -infinite where
    the noise is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        noise = float(np.square(noisy - signal, dtype=np.float64).sum())
        power = float(np.square(signal, dtype=np.float64).sum())
    return decibels(power, noise)


def decibels(power: float, noise: float) -> float:
    """Return a ratio of powers in dB."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def _worst_block(error: Float32, usual: Float32, fmt: Format | None) -> tuple[int, int]:
    """Return row and block, in the candidate's blocks, where the error exceeds the usual most."""
    if error.ndim != 2:
        return 0, 0
    height, width = (fmt.block if fmt is not None and fmt.block else None) or (1, WINDOW)
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.nan_to_num(error * error - usual * usual, nan=np.inf)
    padded = np.pad(excess, ((0, -excess.shape[0] % height), (0, -excess.shape[1] % width)))
    blocks = padded.reshape(padded.shape[0] // height, height, -1, width).sum(axis=(1, 3))
    row, block = np.unravel_index(int(blocks.argmax()), blocks.shape)
    if fmt is None:
        return int(row) * height, int(block) * width
    return int(row) * height, int(block)
