# SPDX-License-Identifier: Apache-2.0
"""A quantized source as an unquantized state dict, decoded tensor by tensor when transformers'
loader reads it.
"""

from __future__ import annotations

from typing import Any

import torch

from exporter.layout import unstacked
from exporter.plan import Reader, Restack, SourceWeight
from exporter.stream import load, load_stack
from verifier.checkpoint import NUMPY_DTYPES, Checkpoint, Tensor
from verifier.layouts.expert_stacks import UnstackedCheckpoint
from verifier.load import hf
from verifier.schemes import FLOATS, canonical, gather


class _DecodedTensor:
    """Represents a tensor that is read, and decoded to BF16 where it is quantized, when it is
    sliced.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: SourceWeight | Tensor) -> None:
        self._checkpoint, self._tensor = checkpoint, tensor

    def __getitem__(self, _index: Any) -> torch.Tensor:
        tensor = self._tensor
        if isinstance(tensor, SourceWeight):
            return load(self._checkpoint, tensor).to(torch.bfloat16)
        if tensor.dtype in FLOATS:
            return hf.plain_tensor(self._checkpoint, tensor)
        return torch.from_numpy(self._checkpoint.array(tensor).copy())


class _DecodedStack:
    """Represents a quantized stack of experts, decoded to BF16 when it is sliced, in the axes of
    the unquantized hub.
    """

    def __init__(self, checkpoint: Checkpoint, action: Restack) -> None:
        self._checkpoint, self._action = checkpoint, action

    def __getitem__(self, _index: Any) -> torch.Tensor:
        (stack,) = self._action.stacks
        experts = [
            load_stack(self._checkpoint, self._action, stack, e, e + 1).to(torch.bfloat16)
            for e in range(stack.shape[0])
        ]
        whole = torch.cat(experts)
        return whole.transpose(1, 2).contiguous() if stack.hub_transposed else whole


def decoded_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return every weight of a checkpoint by its unquantized hub name, read on access.

    Raises:
        PlanError: a quantized weight whose format cannot be inferred, or that is neither 2-D nor a
            known stack.
    """
    state: dict[str, Any] = {}
    in_stacks = set()
    view = unstacked(checkpoint)
    if isinstance(view, UnstackedCheckpoint):
        expert_reader = Reader(view, gather(view.tensors.values()))
        for stack in view.stacks:
            fmt = expert_reader.format(stack.linears[0])
            if fmt is not None:
                state[stack.key] = _DecodedStack(checkpoint, Restack((stack,), fmt, None))
                in_stacks |= {t.name for leaf, t in stack.tensors.items() if leaf != "bias"}
    modules = gather(t for t in checkpoint.tensors.values() if t.name not in in_stacks)
    reader = Reader(checkpoint, modules)
    for name, module in modules.items():
        quantized = reader.format(name) is not None
        for tensor in module.parts.values():
            plain_name = canonical(tensor.name)
            if plain_name is None:
                continue
            if quantized and tensor is module.weight:
                state[plain_name] = _DecodedTensor(checkpoint, reader.weight(name))
            elif tensor.dtype in FLOATS or tensor.dtype in NUMPY_DTYPES:
                state[plain_name] = _DecodedTensor(checkpoint, tensor)
    return state
