# SPDX-License-Identifier: Apache-2.0
"""The result of loading a checkpoint with an engine's own loader, as plain data: the rules of depth
engine read it and import no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from verifier.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Unwritten:
    """A parameter of the engine that the checkpoint wrote only in part, or not at all.

    Attributes:
        name: in the engine's model.
        share: of its elements that were never written, above 0 and up to 1.
        bytes: of these elements.
        tensors: some of the checkpoint's tensors that wrote the rest.
    """

    name: str
    share: float
    bytes: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadScale:
    """A scale with values that are zero or not finite after loading.

    Attributes:
        name: of the parameter in the engine's model.
        tensor: one of the checkpoint's tensors that wrote it, '' where that is not known.
        zeros: how many values are zero.
        nonfinite: how many are not finite.
        of: how many there are.
    """

    name: str
    tensor: str
    zeros: int
    nonfinite: int
    of: int


@dataclass(frozen=True, slots=True)
class Cast:
    """A tensor whose values were cast to another kind of number when they were written.

    Attributes:
        name: of the parameter in the engine's model.
        tensor: of the checkpoint.
        have: its dtype, in torch's spelling.
        want: the parameter's dtype.
    """

    name: str
    tensor: str
    have: str
    want: str


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine's loader made of a checkpoint.

    Attributes:
        engine: its name and version.
        reason: why nothing could be loaded here, or ''.
        stage: the stage in which the engine rejected the checkpoint, or ''.
        error: the engine's message.
        place: the engine's file and function that raised it.
        layers: the first layers that were built, None where all of them were.
        architecture: the engine's model class.
        parameters: how many the model has.
        tensors: how many of the checkpoint's tensors were read.
        unwritten: parameters that were not written as a whole.
        unused: tensors that were read and reached no parameter.
        casts: tensors that were cast to another kind of number.
        bad_scales: scales with zero or non-finite values.
        warnings: the engine's warnings that mean silent loss.
    """

    engine: str
    reason: str = ""
    stage: str = ""
    error: str = ""
    place: str = ""
    layers: int | None = None
    architecture: str = ""
    parameters: int = 0
    tensors: int = 0
    unwritten: tuple[Unwritten, ...] = ()
    unused: tuple[str, ...] = ()
    casts: tuple[Cast, ...] = ()
    bad_scales: tuple[BadScale, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rejected(self) -> bool:
        """Whether the engine rejected the checkpoint."""
        return bool(self.stage)


@dataclass(frozen=True, slots=True)
class EngineLoads:
    """What an engine's loader made of a candidate, and of its base as a control.

    ``base`` is None without a related base, or where the candidate could not be loaded here.
    """

    candidate: EngineLoad
    base: EngineLoad | None = None


class EngineLoader(Protocol):
    """Loads checkpoints with an engine."""

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> EngineLoads:
        """Return the result for a checkpoint, and for the base as a control."""
