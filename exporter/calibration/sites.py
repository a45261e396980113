# SPDX-License-Identifier: Apache-2.0
"""Statistics of a module's inputs: maximum, token count and, for percentiles, a histogram.

Maxima, in float32, and histograms, in int64, stay on the device of the activations until `collect`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

LOWEST = (127 - 24) << 7
"""Bit pattern, as BF16, of 2^-24; the bins of the histogram are the BF16 values from it on."""
BINS = 48 * 128 + 1
"""48 octaves of 128 BF16 values, and one bin for 2^24 and above; the first bin holds everything up
to 2^-24."""
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """The statistic of each slot of a site (0.0 where there was no token), and its tokens."""

    amax: tuple[float, ...]
    tokens: tuple[int, ...]


class Site:
    """A place where activations are read; ``slots`` is 1, or the number of experts that share
    it.
    """

    def __init__(self, slots: int, percentile: float | None = None) -> None:
        self.slots, self.percentile = slots, percentile
        self.called = False
        self._amax: torch.Tensor | None = None
        self._tokens = [0] * slots
        self._counts: torch.Tensor | None = None

    def update(self, slot: int, rows: torch.Tensor) -> None:
        """Add activations, [..., features], any floating dtype; NaN and infinity go into the
        maximum.
        """
        self.called = True
        if rows.numel() == 0:
            return
        if self._amax is None:
            self._amax = torch.zeros(self.slots, dtype=torch.float32, device=rows.device)
            if self.percentile is not None:
                self._counts = torch.zeros(
                    (self.slots, BINS), dtype=torch.int64, device=rows.device
                )
        rows = rows.detach().to(self._amax.device)
        low, high = rows.aminmax()
        amax = self._amax[slot]
        torch.maximum(amax, torch.maximum(high, -low).float(), out=amax)
        self._tokens[slot] += rows.numel() // rows.shape[-1]
        if self._counts is not None:
            for chunk in torch.split(rows.reshape(-1), CHUNK):
                self._counts[slot] += torch.bincount(_bins(chunk), minlength=BINS)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of each slot."""
        return tuple(self._tokens)

    def reduced(self) -> torch.Tensor | None:
        """Return the statistic of each slot, float32 on the site's device; None before the first
        update.
        """
        if self._amax is None or self._counts is None or self.percentile is None:
            return self._amax
        return _quantile(self._counts, self._amax, self.percentile)


def _bins(values: torch.Tensor) -> torch.Tensor:
    """Return the bin of each value: its magnitude rounded up to BF16; exact for BF16."""
    bits = values.float().abs().view(torch.int32)
    return (((bits + 0xFFFF) >> 16) - LOWEST).clamp_(0, BINS - 1)


def _quantile(counts: torch.Tensor, amax: torch.Tensor, percentile: float) -> torch.Tensor:
    """Return the smallest magnitude that at least ``percentile`` % of the values do not exceed,
    float32 [slots].

    Args:
        counts: int64 [slots, BINS].
        amax: float32 [slots]; the result is never above it, and not finite where it is not.
        percentile: above 0, at most 100.
    """
    total = counts.sum(-1, keepdim=True)
    rank = (total.double() * (percentile / 100.0)).ceil().clamp_(min=1.0)
    first = (counts.cumsum(-1).double() >= rank).to(torch.uint8).argmax(-1)
    value = ((first + LOWEST) << 16).to(torch.int32).view(torch.float32)
    value = torch.where(first == 0, torch.zeros_like(value), value)
    value = torch.where(first == BINS - 1, amax, value)
    return torch.where(amax.isfinite(), torch.minimum(value, amax), amax)


def collect(sites: Iterable[Site]) -> dict[Site, SiteStatistics]:
    """Return the statistics of each site, copied to the host with one copy per device."""
    groups: dict[torch.device, list[tuple[Site, torch.Tensor]]] = {}
    statistics: dict[Site, SiteStatistics] = {}
    for site in sites:
        reduced = site.reduced()
        if reduced is None:
            statistics[site] = SiteStatistics((0.0,) * site.slots, site.tokens)
        else:
            groups.setdefault(reduced.device, []).append((site, reduced))
    for group in groups.values():
        amax = iter(torch.cat([values for _, values in group]).cpu().tolist())
        for site, _ in group:
            statistics[site] = SiteStatistics(tuple(islice(amax, site.slots)), site.tokens)
    return statistics


def problem(amax: float) -> str | None:
    """Return what is wrong with an input maximum, or None: it must give a normal float32 scale
    (amax / 2688).
    """
    if math.isnan(amax):
        return "NaN"
    if math.isinf(amax):
        return "infinite"
    if amax < 0:
        return "negative"
    if amax == 0:
        return "zero"
    info = torch.finfo(torch.float32)
    if amax / 2688.0 < info.tiny:
        return "tiny"
    return "huge" if amax > info.max else None
