# SPDX-License-Identifier: Apache-2.0
"""Readers of experts modules without transformers' decorator, by class name; some refuse the class.

Other packages add theirs with the entry-point group ``ckptgate.experts``: a function that calls
`register`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from exporter.detect.layouts import ExpertStack, Refused, parameters
from verifier.errors import UsageError

Reader = Callable[[str, Any], ExpertStack | Refused]
READERS: dict[str, Reader] = {}


def register(cls: str) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of the modules of a class.

    Raises:
        UsageError: the class has a reader already.
    """

    def add(reader: Reader) -> Reader:
        if cls in READERS:
            raise UsageError(f"the experts class {cls} is registered twice")
        READERS[cls] = reader
        return reader

    return add


@lru_cache(maxsize=1)
def load_plugins() -> None:
    """Run the registering functions of other packages, once."""
    for entry in entry_points(group="ckptgate.experts"):
        entry.load()()


def _gated(
    path: str, module: Any, experts: int, hidden: int, intermediate: int, *, transposed: bool
) -> ExpertStack:
    """Return the stacks gate_up_proj, gate first, and down_proj of a registered class."""
    return ExpertStack(
        path=path,
        cls=type(module).__name__,
        experts=experts,
        first="gate_up_proj",
        down="down_proj",
        hidden=hidden,
        intermediate=intermediate,
        gated=True,
        transposed=transposed,
        interleaved=False,
        bias=False,
        by="class",
    )


@register("Llama4TextExperts")
def llama4(path: str, module: Any) -> ExpertStack | Refused:
    """Read [experts, hidden, 2 * intermediate] and [experts, intermediate, hidden], gate first."""
    own = parameters(module)
    count, hidden, rows = own["gate_up_proj"]
    return _gated(path, module, count, hidden, rows // 2, transposed=True)


@register("Step3p7Experts")
def step3p7(path: str, module: Any) -> ExpertStack | Refused:
    """Read the standard layout; the hub keeps gate, up and down as three stacks."""
    own = parameters(module)
    count, rows, hidden = own["gate_up_proj"]
    return _gated(path, module, count, hidden, rows // 2, transposed=False)


@register("LongcatFlashExperts")
def longcat_flash(path: str, module: Any) -> ExpertStack | Refused:
    """Read the standard layout; gate and up have rows for zero experts after the routed ones."""
    own = parameters(module)
    if not own:
        return Refused(path, type(module).__name__, "it has zero experts only")
    count, hidden, inner = own["down_proj"]
    return _gated(path, module, count, hidden, inner, transposed=False)


@register("DbrxExpertGLU")
def dbrx(path: str, module: Any) -> ExpertStack | Refused:
    """Refuse two-dimensional stacks w1, v1, w2 of [experts * intermediate, hidden]."""
    return Refused(
        path,
        type(module).__name__,
        "its experts are rows of two-dimensional stacks, down transposed",
    )


@register("JetMoeParallelExperts")
def jetmoe(path: str, module: Any) -> ExpertStack | Refused:
    """Refuse one stack for input and one for output, also in attention."""
    return Refused(
        path,
        type(module).__name__,
        "its input and output stacks are in separate modules, also in attention",
    )


@register("InklingSharedExperts")
def inkling_shared(path: str, module: Any) -> ExpertStack | Refused:
    """Refuse stacks of shared experts, interleaved on the hub."""
    return Refused(
        path, type(module).__name__, "its shared experts are stored interleaved on the hub"
    )
