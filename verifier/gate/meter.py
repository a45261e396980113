# SPDX-License-Identifier: Apache-2.0
"""How far scoring is: documents of each model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from verifier.gate.jobs import Unit
from verifier.progress import Progress


class ModelMeter:
    """Counts the scored documents of one model.

    A document of several windows counts by the share of them that is scored: units of work go by
    the length of windows, so many documents would end together.

    Args:
        model: what progress calls it: ``candidate``, ``base``; '' for a model by itself.
        units: all units of the model.
        kept: numbers of the units that are scored already.
    """

    def __init__(self, model: str, units: Sequence[Unit], kept: Collection[int] = ()) -> None:
        self.model = model
        owners = {owner for u in units for window in u.windows for owner in window[1]}
        self.documents = len(owners | {number for u in units for number, _ in u.texts})
        self._total = sum(len(unit) for unit in units)
        self._done = sum(len(unit) for unit in units if unit.number in kept)

    def add(self, unit: Unit) -> None:
        """Count a unit that is scored now."""
        self._done = min(self._done + len(unit), self._total)

    @property
    def scored(self) -> int:
        """The documents that are scored, rounded down."""
        return self.documents * self._done // max(1, self._total)


def report(meters: Sequence[ModelMeter], progress: Progress) -> None:
    """Report the documents of all models together, and of each one where there are several."""
    counts = [f"{m.model} {m.scored:,} of {m.documents:,}" for m in meters]
    detail = ", ".join(counts) if len(meters) > 1 else meters[0].model
    progress(sum(m.scored for m in meters), sum(m.documents for m in meters), detail)


def report_start(meters: Sequence[ModelMeter], progress: Progress) -> None:
    """Report that models are being loaded: its time says nothing about the rate of scoring."""
    models = " and ".join(m.model for m in meters if m.model)
    progress(0, 0, f"loading {models}" if models else "loading")
