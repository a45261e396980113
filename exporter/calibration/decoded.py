# SPDX-License-Identifier: Apache-2.0
"""A quantized source as an unquantized state dict, decoded tensor by tensor when transformers' loader asks."""

from __future__ import annotations

from typing import Any

import torch

from exporter.plan import Reader, Weight
from exporter.stream import load
from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor
from verifier.schemes import FLOATS, canonical, gather

_BITS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _Lazy:
    """Stands for a tensor that is read, and decoded to BF16 where it is quantized, when it is sliced."""

    def __init__(self, checkpoint: Checkpoint, what: Weight | Tensor) -> None:
        self._checkpoint, self._what = checkpoint, what

    def __getitem__(self, _index: Any) -> torch.Tensor:
        if isinstance(self._what, Weight):
            return load(self._checkpoint, self._what).to(torch.bfloat16)
        raw = self._checkpoint.read(self._what).copy()
        if self._what.dtype in _BITS:
            return torch.from_numpy(raw).view(_BITS[self._what.dtype]).reshape(self._what.shape)
        return torch.from_numpy(raw.view(NUMPY_DTYPES[self._what.dtype]).reshape(self._what.shape))


def decoded_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return every weight of a checkpoint by its unquantized hub name, read on access.

    Raises:
        PlanError: a quantized weight whose format cannot be told, or that is not two-dimensional.
    """
    modules = gather(checkpoint.tensors.values())
    reader = Reader(checkpoint, modules)
    found: dict[str, Any] = {}
    for name, module in modules.items():
        quantized = reader.format(name) is not None
        for tensor in module.parts.values():
            plain = canonical(tensor.name)
            if plain is None:
                continue
            if quantized and tensor is module.weight:
                found[plain] = _Lazy(checkpoint, reader.weight(name))
            elif tensor.dtype in FLOATS or tensor.dtype in NUMPY_DTYPES:
                found[plain] = _Lazy(checkpoint, tensor)
    return found
