# SPDX-License-Identifier: Apache-2.0
"""Read how a module stores its experts from the flags of transformers' decorator or its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A module that holds all routed experts of a layer.

    ``first`` names the parameter of gate and up (or up alone), [experts, 2 * intermediate, hidden],
    and ``down`` is [experts, hidden, intermediate]; ``transposed`` swaps the last two axes of both.
    With ``interleaved``, the rows of gate and up alternate. ``by`` is the source of the layout:
    flags, shapes, class or plugin.
    """

    path: str
    cls: str
    experts: int
    first: str
    down: str
    hidden: int
    intermediate: int
    gated: bool
    transposed: bool
    interleaved: bool
    bias: bool
    by: str

    @property
    def linears(self) -> int:
        """The number of linear layers on the hub: two or three per expert."""
        return self.experts * (3 if self.gated else 2)


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A dense linear layer of gate and up in one, [2 * intermediate, hidden]."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A module whose experts are in an unknown layout, and the reason."""

    path: str
    cls: str
    reason: str


def parameters(module: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own parameters."""
    return {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}


def by_flags(path: str, module: Any) -> ExpertStack | Refused:
    """Read a decorated module by its flags; its shapes must agree with them."""
    own, name = parameters(module), type(module).__name__
    gated = bool(module.has_gate)
    first = "gate_up_proj" if gated else "up_proj"
    if first not in own or "down_proj" not in own:
        return Refused(
            path,
            name,
            f"its flags require {first} and down_proj; it has {', '.join(own) or 'no parameters'}",
        )
    sizes = _sizes(own[first], own["down_proj"], gated=gated, transposed=bool(module.is_transposed))
    if sizes is None:
        shapes = f"{first} {list(own[first])}, down_proj {list(own['down_proj'])}"
        return Refused(
            path,
            name,
            f"its shapes contradict its flags (transposed {bool(module.is_transposed)}): {shapes}",
        )
    return ExpertStack(
        path,
        name,
        own["down_proj"][0],
        first,
        "down_proj",
        *sizes,
        gated,
        bool(module.is_transposed),
        gated and not module.is_concatenated,
        bool(module.has_bias),
        "flags",
    )


def by_shapes(path: str, module: Any, hidden: int | None) -> ExpertStack | Refused | None:
    """Read an undecorated module with 3-D expert parameters and an expert count; None for any other
    module.

    It is accepted if its shapes are unambiguous. ``hidden`` is the model's hidden size, which
    distinguishes the axes of a non-gated stack.
    """
    own, name = parameters(module), type(module).__name__
    first = next((n for n in ("gate_up_proj", "up_proj") if len(own.get(n, ())) == 3), None)
    if first is None or len(own.get("down_proj", ())) != 3 or "gate_proj" in own:
        return None
    count = own["down_proj"][0]
    if count not in {getattr(module, c, None) for c in COUNTS} or own[first][0] != count:
        return Refused(
            path, name, "3-D gate, up and down projections without a matching expert count"
        )
    gated = first == "gate_up_proj"
    readings = {}
    for transposed in (False, True):
        sizes = _sizes(own[first], own["down_proj"], gated=gated, transposed=transposed)
        if sizes is not None:
            readings[transposed] = sizes
    if len(readings) > 1 and hidden is not None:
        readings = {t: sizes for t, sizes in readings.items() if sizes[0] == hidden}
    if len(readings) != 1:
        problem = "are ambiguous" if readings else "fit no known layout"
        shapes = f"{first} {list(own[first])} and down_proj {list(own['down_proj'])}"
        return Refused(path, name, f"{shapes} {problem}")
    ((transposed, (size, inner)),) = readings.items()
    bias = f"{first}_bias" in own or "down_proj_bias" in own
    return ExpertStack(
        path, name, count, first, "down_proj", size, inner, gated, transposed, False, bias, "shapes"
    )


def _sizes(
    first: tuple[int, ...], down: tuple[int, ...], *, gated: bool, transposed: bool
) -> tuple[int, int] | None:
    """Return (hidden, intermediate) of a pair of stacks, or None if their shapes do not fit."""
    if len(first) != 3 or len(down) != 3 or first[0] < down[0]:
        return None
    (rows, hidden), (out, inner) = first[1:], down[1:]
    if transposed:
        rows, hidden, out, inner = hidden, rows, inner, out
    return (hidden, inner) if out == hidden and rows == inner * (2 if gated else 1) else None
