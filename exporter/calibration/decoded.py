# SPDX-License-Identifier: Apache-2.0
"""A quantized source as an unquantized state dict, decoded tensor by tensor when transformers'
loader asks.
"""

from __future__ import annotations

from typing import Any

import torch

from exporter.layout import Unstacked, unstacked
from exporter.plan import Reader, Restack, Weight
from exporter.stream import load, load_stack
from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor
from verifier.schemes import FLOATS, canonical, gather

_BITS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _Lazy:
    """Stands for a tensor that is read, and decoded to BF16 where it is quantized, when it is
    sliced.
    """

    def __init__(self, checkpoint: Checkpoint, what: Weight | Tensor) -> None:
        self._checkpoint, self._what = checkpoint, what

    def __getitem__(self, _index: Any) -> torch.Tensor:
        if isinstance(self._what, Weight):
            return load(self._checkpoint, self._what).to(torch.bfloat16)
        raw = self._checkpoint.read(self._what).copy()
        if self._what.dtype in _BITS:
            return torch.from_numpy(raw).view(_BITS[self._what.dtype]).reshape(self._what.shape)
        return torch.from_numpy(raw.view(NUMPY_DTYPES[self._what.dtype]).reshape(self._what.shape))


class _LazyStack:
    """Stands for a quantized stack of experts, decoded to BF16 when it is sliced, in the axes of
    the unquantized hub.
    """

    def __init__(self, checkpoint: Checkpoint, what: Restack) -> None:
        self._checkpoint, self._what = checkpoint, what

    def __getitem__(self, _index: Any) -> torch.Tensor:
        (stack,) = self._what.stacks
        values = [
            load_stack(self._checkpoint, self._what, stack, e, e + 1).to(torch.bfloat16)
            for e in range(stack.shape[0])
        ]
        whole = torch.cat(values)
        return whole.transpose(1, 2).contiguous() if stack.written_turned else whole


def decoded_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return every weight of a checkpoint by its unquantized hub name, read on access.

    Raises:
        PlanError: a quantized weight whose format cannot be told, or that is not two-dimensional
            and no stack that is known.
    """
    found: dict[str, Any] = {}
    within = set()
    each = unstacked(checkpoint)
    if isinstance(each, Unstacked):
        single = Reader(each, gather(each.tensors.values()))
        for stack in each.stacks.stacks:
            read = single.format(stack.members[0])
            if read is not None:
                found[stack.key] = _LazyStack(checkpoint, Restack((stack,), read, None))
                within |= {t.name for leaf, t in stack.parts.items() if leaf != "bias"}
    modules = gather(t for t in checkpoint.tensors.values() if t.name not in within)
    reader = Reader(checkpoint, modules)
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
