# SPDX-License-Identifier: Apache-2.0
"""Figures of what was encoded, for the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from exporter import codecs


@dataclass(frozen=True)
class EncodeSummary:
    """What encodings to one algorithm wrote.

    Attributes:
        algo: the algorithm.
        linears: how many linear layers.
        low: the smallest effective scale.
        high: the largest effective scale.
        blocks: blocks of 16 that were read from MXFP4.
        changed: those of them whose values changed.
    """

    algo: str
    linears: int
    low: float
    high: float
    blocks: int = 0
    changed: int = 0


def combine(summaries: Iterable[EncodeSummary]) -> dict[str, EncodeSummary]:
    """Return the sum of summaries, by algorithm."""
    total: dict[str, EncodeSummary] = {}
    for summary in summaries:
        other = total.get(summary.algo)
        total[summary.algo] = summary if other is None else _sum(other, summary)
    return total


def _sum(a: EncodeSummary, b: EncodeSummary) -> EncodeSummary:
    return EncodeSummary(
        a.algo,
        a.linears + b.linears,
        min(a.low, b.low),
        max(a.high, b.high),
        a.blocks + b.blocks,
        a.changed + b.changed,
    )


def scale_range(parts: codecs.Parts) -> tuple[float, float]:
    """Return the smallest and largest effective scale of a weight, or of a stack of experts."""
    scale = parts["weight_scale"] if "weight_scale" in parts else parts["weight_scale_inv"]
    if scale.dtype == torch.float32:
        return float(scale.min()), float(scale.max())
    if scale.dtype == torch.uint8:
        return 2.0 ** (int(scale.min()) - 127), 2.0 ** (int(scale.max()) - 127)
    # E4M3 without a sign orders like its bytes.
    whole = parts["weight_scale_2"].reshape(-1).double()
    raw = scale.view(torch.uint8).reshape(whole.numel(), -1)
    low, high = (end.view(torch.float8_e4m3fn).double() for end in (raw.amin(1), raw.amax(1)))
    return float((low * whole).min()), float((high * whole).max())
