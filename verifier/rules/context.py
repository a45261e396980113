# SPDX-License-Identifier: Apache-2.0
"""What a rule reads and writes: the checkpoint, what it is compared with, and a tally."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from verifier.checkpoint import Checkpoint, Tensor
from verifier.evaluation import Evaluation
from verifier.findings import Effect, Finding, Severity, Where
from verifier.layouts.expert_stacks import UnstackedCheckpoint, file_offset, unstacked
from verifier.payload.pass_through import PassThrough
from verifier.payload.reader import PayloadReader
from verifier.quantized import QuantizedCheckpoint
from verifier.rules.deprecated import moved_attribute
from verifier.rules.expectations import Expectations
from verifier.schemes import Module

if TYPE_CHECKING:
    from verifier.rules.engine_loading import EngineLoader, EngineLoads
    from verifier.rules.loading import Loaded, Loader

T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """How many units a rule had to examine (``of``), how many it did (``checked``), and the reason
    for the rest.
    """

    checked: int = 0
    of: int = 0
    reason: str = ""

    def see(self, count: int = 1) -> None:
        """Count units that the checkpoint has and that were examined."""
        self.checked += count
        self.of += count

    def miss(self, count: int, reason: str) -> None:
        """Count units that the checkpoint has and that could not be examined."""
        self.of += count
        if count:
            self.reason = reason


@dataclass(frozen=True, slots=True)
class Inputs:
    """What rules get next to the checkpoints: the tensor and expert parallel sizes to serve with,
    how weights relate to the base's ('' for as in the base), a loader (depth load), an engine's
    loader (depth engine), and scores (depth eval).
    """

    tp: int | None = None
    ep: int | None = None
    weights: str = ""
    loader: Loader | None = None
    engine_loader: EngineLoader | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Context:
    """What one run of one rule reads, and its tally.

    Attributes:
        candidate: the checkpoint, or some of its modules where the rule is run in parts. The
            experts of a stack are modules of their own (`verifier.layouts.expert_stacks`).
        base: the checkpoint to compare with.
        merged_from: the overlay checkpoint whose bytes a mixed export keeps.
        expectations: names, shapes and layers that belong in the checkpoint.
        payload: reads bytes of the candidate.
        inputs: what else was passed to the check.
        rule_id: the running rule, for `finding`.
        severity: its severity.
        tally: what it examined.
    """

    candidate: QuantizedCheckpoint
    base: QuantizedCheckpoint | None
    merged_from: QuantizedCheckpoint | None
    expectations: Expectations
    payload: PayloadReader
    inputs: Inputs = Inputs()
    rule_id: str = ""
    severity: Severity = "error"
    tally: Tally = field(default_factory=Tally)

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        base: Checkpoint | None = None,
        merged_from: Checkpoint | None = None,
        inputs: Inputs = Inputs(),
    ) -> Context:
        """Return the context of a whole checkpoint."""
        candidate = QuantizedCheckpoint(unstacked(checkpoint))
        reference = QuantizedCheckpoint(unstacked(base)) if base else None
        overlay = QuantizedCheckpoint(unstacked(merged_from)) if merged_from else None
        source = overlay or reference
        kept = PassThrough(candidate, source, overlay=source is overlay) if source else None
        return Context(
            candidate,
            reference,
            overlay,
            Expectations(candidate, reference),
            PayloadReader(candidate.checkpoint, kept),
            inputs,
        )

    def part(self, modules: Iterable[Module]) -> Context:
        """Return a context of some modules, which scans their tensors for itself."""
        return replace(self, candidate=self.candidate.part(modules), payload=self.payload.part())

    def for_rule(self, rule_id: str, severity: Severity) -> Context:
        """Return a context for one run of one rule, with an empty tally."""
        return replace(self, rule_id=rule_id, severity=severity, tally=Tally())

    def prepare(self) -> None:
        """Work out what all parts share, before threads or processes each would do so."""
        _ = self.expectations.shapes, self.expectations.unrelated_base
        for checkpoint in (self.candidate, self.base, self.merged_from):
            _ = checkpoint and checkpoint.formatted
        _ = self.payload.pass_through and self.payload.pass_through.sources

    @property
    def checkpoint(self) -> Checkpoint:
        """The candidate's files, headers and configs."""
        return self.candidate.checkpoint

    @property
    def loaded(self) -> Loaded:
        """What the loader made of the candidate, and of a related base; loaded once."""
        loader = self.inputs.loader
        if loader is None:
            raise ValueError("a rule of depth load was run without a loader")
        return self.cached("loaded", lambda: loader(self.checkpoint, self._related_base))

    @property
    def engine_loads(self) -> EngineLoads:
        """What an engine's loader made of the candidate, and of a related base; loaded once."""
        loader = self.inputs.engine_loader
        if loader is None:
            raise ValueError("a rule of depth engine was run without an engine")
        return self.cached("engine", lambda: loader(self.checkpoint, self._related_base))

    @property
    def _related_base(self) -> Checkpoint | None:
        related = self.base is not None and not self.expectations.unrelated_base
        return self.base.checkpoint if self.base is not None and related else None

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """Return a small result of the whole checkpoint; ``make`` is called on first use."""
        return self.payload.results.of_checkpoint(key, make)

    def pass_through(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tensor, tensor of the source) for each that must equal its source: the overlay
        where there is one, else the base.
        """
        if self.payload.pass_through is None:
            raise ValueError("neither a base nor a merged-from checkpoint")
        return self.payload.pass_through.pairs(self.candidate.modules.values())

    def finding(
        self,
        message: str,
        *,
        cause: str = "",
        tensor: str | None = None,
        severity: Severity | None = None,
        where: Where | None = None,
        observed: object = "",
        expected: object = "",
        count: int = 1,
        engines: Mapping[str, tuple[Severity, str]] | None = None,
    ) -> Finding:
        """Return a finding of the running rule.

        ``message`` says what is wrong in words that may change. ``cause`` says it in words that
        never change, with the name that it is about where the finding has no tensor: a baseline
        recognizes the finding by it, and a rule that reports one kind of defect needs none.
        ``engines`` is as in `verifier.rules.Rule`, for this finding alone.
        """
        if where is None:
            known = self.checkpoint.tensors.get(tensor) if tensor else None
            where = Where(tensor, known.file if known else None)
        if isinstance(self.checkpoint, UnstackedCheckpoint):
            stack = self.checkpoint.stacked.get(where.tensor or "")
            observed = f"{observed} (stored in {stack})".strip() if stack else observed
        effects = tuple(Effect(engine, *rest) for engine, rest in (engines or {}).items())
        return Finding(
            self.rule_id,
            severity or self.severity,
            message,
            where,
            str(observed),
            str(expected),
            count,
            effects=effects,
            cause=cause,
        )

    def at_byte(self, tensor: Tensor, flat: int) -> Where:
        """Return the location of byte ``flat`` of a tensor: row, block, and offset in its file."""
        itemsize = max(1, tensor.nbytes // max(1, tensor.elements))
        index = np.unravel_index(flat // itemsize, tensor.shape) if tensor.shape else ()
        row = int(index[-2]) if len(index) >= 2 else (int(index[0]) if index else None)
        block = int(index[-1]) if len(index) >= 2 else None
        start = file_offset(tensor.offset)
        byte = start + flat if start is not None else None
        return Where(tensor.name, tensor.file, row, block, byte)

    if not TYPE_CHECKING:  # else a type checker would accept any attribute

        def __getattr__(self, name: str) -> object:
            return moved_attribute(self, name)
