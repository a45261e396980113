# SPDX-License-Identifier: Apache-2.0
"""Stats files: the activation maxima that a calibration measured, by module name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from verifier.checkpoint import NUMPY_DTYPES, Tensor
from verifier.checkpoint.header import read_shard
from verifier.checkpoint.source import LocalSource
from verifier.errors import PlanError, UsageError
from verifier.schemes import FLOATS

INPUT_LEAF = "input_amax"
KV_LEAVES = ("k_amax", "v_amax")
MAX_DIVISOR = 2688.0
"""What an input maximum is divided by at most to give a scale (NVFP4: 448 * 6)."""


@dataclass(frozen=True, slots=True)
class ActivationStats:
    """Input maxima by hub module; KV maxima by ``<hub k_proj>.k_amax``, ``<hub v_proj>.v_amax``."""

    inputs: Mapping[str, float]
    kv: Mapping[str, float] = field(default_factory=dict)


def read_stats(path: str | os.PathLike[str]) -> ActivationStats:
    """Return the maxima of a stats file.

    Args:
        path: a safetensors file of scalars ``<hub module>.input_amax``, ``<hub k_proj>.k_amax`` and
            ``<hub v_proj>.v_amax``; other tensors are ignored.

    Raises:
        UsageError: no such file.
        PlanError: not a safetensors file, no maximum, or one that is not finite and positive.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such stats file")
    source = LocalSource(file.parent)
    shard = read_shard(source, file.name, file.stat().st_size)
    if shard.problems:
        raise PlanError(f"{file}: not a stats file: {shard.problems[0].message}")
    inputs: dict[str, float] = {}
    kv: dict[str, float] = {}
    for name, tensor in shard.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == INPUT_LEAF:
            inputs[module] = _maximum(file, tensor, source)
        elif leaf in KV_LEAVES:
            kv[name] = _maximum(file, tensor, source)
    if not inputs and not kv:
        raise PlanError(f"{file}: holds no tensor named <module>.{INPUT_LEAF}")
    return ActivationStats(inputs, kv)


def _maximum(file: Path, tensor: Tensor, source: LocalSource) -> float:
    if tensor.dtype not in FLOATS:
        raise PlanError(
            f"{file}: {tensor.name} is {tensor.dtype}; an input maximum is one of "
            f"{', '.join(sorted(FLOATS))}"
        )
    raw = source.read(tensor.file, tensor.offset, tensor.nbytes)
    values = raw.view(NUMPY_DTYPES[tensor.dtype]).astype(np.float32)
    amax = float(values.max(initial=0.0))
    if not math.isfinite(amax) or amax / MAX_DIVISOR < np.finfo(np.float32).tiny:
        raise PlanError(
            f"{file}: {tensor.name} is {amax}; an input maximum is a finite number above zero"
        )
    return amax
