# SPDX-License-Identifier: Apache-2.0
"""The result of loading a checkpoint into a model, as plain data: the rules of depth load read it
and import no torch.
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
            parameter; ``mismatched``, a tensor of the wrong shape; ``unconverted``, a parameter
            whose tensors the loader could not put together.
        name: the tensor's name where it is known, else the parameter's.
        have: the tensor's shape, or the loader's message.
        want: the parameter's shape.
    """

    kind: Kind
    name: str
    have: str = ""
    want: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """The result of a forward pass on the fixed prompt, compared with the base's.

    Attributes:
        positions: tokens of the prompt.
        broken: positions with a logit that is not finite.
        distance: relative distance of the logits from the base's, None where they are not compared.
        agree: positions with the same top-1 token.
        why_not: why there is no distance.
    """

    positions: int
    broken: int = 0
    distance: float | None = None
    agree: int = 0
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of loading a checkpoint.

    Attributes:
        loader: its name and version.
        reason: why nothing could be loaded, or ''.
        keys: number of parameters and persistent buffers of the model.
        misfits: names that do not fit the model, except for those that do not fit in the base.
        shared: names that do not fit in the base either.
        dropped: names that the model's class drops on purpose.
        native: whether the loader reads the declared format itself.
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
    """Loads a decoded checkpoint into a model."""

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> Loaded:
        """Return the result for a checkpoint; ``base`` is the unquantized one to compare with."""
