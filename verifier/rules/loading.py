# SPDX-License-Identifier: Apache-2.0
"""What a loader made of a checkpoint, in plain data: the rules of depth load judge it and import no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from verifier.checkpoint import Checkpoint

Kind = Literal["missing", "unexpected", "mismatched", "unconverted"]


@dataclass(frozen=True, slots=True, order=True)
class Misfit:
    """A name that does not fit the model.

    Attributes:
        kind: ``missing``, a parameter without a tensor; ``unexpected``, a tensor without a
            parameter; ``mismatched``, one of another shape; ``unconverted``, a parameter whose
            tensors the loader could not put together.
        name: the tensor's name where one is known, else the parameter's in memory.
        have: the shape, or what the loader says.
        want: the shape that belongs there.
    """

    kind: Kind
    name: str
    have: str = ""
    want: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward pass on the fixed prompt gave: of the candidate, and against the base's.

    Attributes:
        positions: tokens of the prompt.
        broken: positions whose logits are not all finite.
        distance: the relative distance of the logits to the base's, None where there is none to
            compare with.
        agree: positions at which both have the same likeliest token.
        why_not: why there is no distance.
    """

    positions: int
    broken: int = 0
    distance: float | None = None
    agree: int = 0
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the loader did.

    Attributes:
        loader: its name and version.
        reason: why nothing could be loaded, '' where something was.
        keys: parameters and persistent buffers of the model.
        misfits: what does not fit, the base's own excepted.
        shared: what does not fit in the base's own load either.
        dropped: names that the model's class says it drops on purpose.
        native: whether the loader reads the declared format by itself.
        forward: None where values were not loaded.
        why_no_values: why they were not.
    """

    loader: str
    reason: str = ""
    keys: int = 0
    misfits: tuple[Misfit, ...] = ()
    shared: tuple[Misfit, ...] = ()
    dropped: tuple[str, ...] = ()
    native: bool = True
    forward: Forward | None = None
    why_no_values: str = ""


class Loader(Protocol):
    """What puts a checkpoint, decoded, into a model."""

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> Loaded:
        """Return what became of a checkpoint; ``base`` is the unquantized one to compare with."""
