# SPDX-License-Identifier: Apache-2.0
"""Attach readers to a model and remove them again, also after an exception."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from exporter.calibration.attention import KvState
from exporter.calibration.experts import reading
from exporter.calibration.names import Target
from exporter.calibration.sites import Site
from verifier.load.experts import experts_implementation


@dataclass
class Readers:
    """The sites of a model under calibration: by target, and by state of its KV cache."""

    inputs: dict[Target, Site] = field(default_factory=dict)
    cache: dict[KvState, Site] = field(default_factory=dict)


@contextmanager
def observing(
    model: Any, targets: Sequence[Target], kv: Iterable[KvState], *, percentile: float | None = None
) -> Iterator[Readers]:
    """Read the inputs of ``targets`` while the context is open; the sites of ``kv`` are for
    `attention.ReadingCache`.

    Hooks, the experts implementation of every config, and transformers' registry are as before when
    it closes, also after an exception. Parameters and outputs do not change.

    Args:
        model: a transformers model.
        targets: the modules whose input is read.
        kv: the states of the KV cache that are read.
        percentile: of the magnitudes of inputs, in (0, 100]; None for their maximum. KV statistics
            are always maxima.

    Raises:
        ContentError: the experts implementation of a module cannot be set.
    """
    readers = Readers(cache={state: Site(1) for state in kv})
    linears: dict[str, Site] = {}
    stacks: dict[str, tuple[Site, Site]] = {}
    for target in targets:
        if target.kind == "linear":
            readers.inputs[target] = linears.setdefault(target.path, Site(1, percentile))
            continue
        if target.path not in stacks:
            count = model.get_submodule(target.path).down_proj.shape[0]
            stacks[target.path] = (Site(count, percentile), Site(count, percentile))
        gate_up, down = stacks[target.path]
        readers.inputs[target] = down if target.kind == "down" else gate_up
    with ExitStack() as stack:
        for path, site in linears.items():
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(_input_hook(site), with_kwargs=True)
            stack.callback(handle.remove)
        if stacks:
            forward = reading({model.get_submodule(p): sites for p, sites in stacks.items()})
            name = f"ckptgate_{uuid.uuid4().hex}"
            stack.enter_context(experts_implementation(model, name, forward, stacks))
        yield readers


def _input_hook(site: Site) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site.update(0, args[0] if args else kwargs["input"])

    return hook
