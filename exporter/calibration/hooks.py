# SPDX-License-Identifier: Apache-2.0
"""Put readers on a model and take them off again, whatever happens in between."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from exporter.calibration.attention import KvSpot
from exporter.calibration.experts import reading
from exporter.calibration.names import Target
from exporter.calibration.sites import Site
from verifier.errors import PlanError
from verifier.load.experts import implementations


@dataclass
class Readers:
    """The sites of a model under calibration: by target, and by what goes into its KV cache."""

    inputs: dict[Target, Site] = field(default_factory=dict)
    cache: dict[KvSpot, Site] = field(default_factory=dict)


@contextmanager
def observing(
    model: Any, targets: Sequence[Target], kv: Iterable[KvSpot], *, percentile: float | None = None
) -> Iterator[Readers]:
    """Read the inputs of ``targets`` while the context is open; the sites of ``kv`` are for
    `attention.ReadingCache`.

    Hooks, the experts implementation of every config, and transformers' registry are as before when
    it closes, also after an exception. Parameters and outputs are not touched.

    Args:
        model: a transformers model.
        targets: what to read the input of.
        kv: what to read of the KV cache.
        percentile: of the magnitudes of inputs, in (0, 100]; None for their maximum. KV statistics
            are always maxima.

    Raises:
        PlanError: the experts implementation of a module cannot be set.
    """
    readers, handles = Readers(cache={spot: Site(1) for spot in kv}), []
    linears: dict[str, Site] = {}
    stacks: dict[str, tuple[Site, Site]] = {}
    for target in targets:
        if target.kind == "linear":
            readers.inputs[target] = linears.setdefault(target.path, Site(1, percentile))
            continue
        if target.path not in stacks:
            count = model.get_submodule(target.path).down_proj.shape[0]
            stacks[target.path] = (Site(count, percentile), Site(count, percentile))
        readers.inputs[target] = stacks[target.path][target.kind == "down"]
    try:
        for path, site in linears.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(_input_hook(site), with_kwargs=True))
        with _experts(model, stacks):
            yield readers
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(site: Site) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site.update(0, args[0] if args else kwargs["input"])

    return hook


@contextmanager
def _experts(model: Any, stacks: Mapping[str, tuple[Site, Site]]) -> Iterator[None]:
    """Have the experts modules call the reading implementation."""
    if not stacks:
        yield
        return
    from transformers.integrations import moe  # noqa: PLC0415  (of use to models with experts only)

    functions: Any = moe.ALL_EXPERTS_FUNCTIONS
    name = f"ckptgate_{uuid.uuid4().hex}"
    before = implementations(model)
    # An entry of the instance can be deleted; what its method register() adds cannot.
    functions[name] = reading({model.get_submodule(path): sites for path, sites in stacks.items()})
    try:
        model.set_experts_implementation(name)
        for path in stacks:
            module = model.get_submodule(path)
            if module.config._experts_implementation != name:
                raise PlanError(
                    f"{path} ({type(module).__name__}) does not follow transformers' experts interface"
                )
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
        del functions[name]
