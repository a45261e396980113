# SPDX-License-Identifier: Apache-2.0
"""A transformers model in memory, read as a checkpoint in hub layout: each hub tensor is cut out
when it is asked for.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from exporter.layout.layout import Layout, of_model
from exporter.layout.pieces import Shape
from verifier.checkpoint import Checkpoint, Tensor
from verifier.checkpoint.header import Shard
from verifier.checkpoint.source import Bytes, Source
from verifier.errors import MachineError, PlanError

DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}


class MemorySource(Source):
    """Hub tensors of a model, each a file of its own; what the model has no place for is read from
    its source.
    """

    def __init__(
        self,
        uri: str,
        layout: Layout,
        state: Mapping[str, torch.Tensor],
        kept: Mapping[str, Checkpoint],
        beside: Mapping[str, bytes],
    ) -> None:
        self.uri = uri
        self._beside = beside
        self._layout, self._state, self._kept = layout, state, kept
        self._last = threading.local()  # a large tensor is read in pieces

    def files(self) -> dict[str, int]:
        """Return the files beside the weights."""
        return {n: len(raw) for n, raw in self._beside.items()}

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return bytes of a hub tensor, from memory or from the source.

        Raises:
            MachineError: the tensor is shorter.
        """
        if name in self._beside:
            return np.frombuffer(self._beside[name], np.uint8)[offset : offset + length]
        if name in self._kept:
            origin = self._kept[name]
            tensor = origin.tensors[name]
            return origin.source.read(tensor.file, tensor.offset + offset, length)
        if getattr(self._last, "name", None) != name:
            value = self._layout.hub_tensor(name, self._state).contiguous().reshape(-1)
            self._last.raw, self._last.name = value.view(torch.uint8).cpu().numpy(), name
        found: Bytes = self._last.raw[offset : offset + length]
        if found.size != length:
            raise MachineError(f"{name}: {found.size} bytes where {length} were asked for")
        return found


def as_checkpoint(
    model: Any, source: Checkpoint | None = None, names: Mapping[str, Shape] | None = None
) -> Checkpoint:
    """Return a model as a checkpoint in hub layout; nothing is copied until it is read.

    Args:
        model: a transformers model whose parameters are on one host; unquantized.
        source: the checkpoint that it was loaded from: its index decides the layout, and what the
            model has no place for (next-token-prediction heads), or holds narrower than the source
            without having changed it, is read from there.
        names: names and logical shapes of the source's weights.

    Raises:
        UnsupportedConversion: a tensor that cannot be brought to hub layout.
        PlanError: a parameter without values (the meta device), or of a dtype that safetensors does
            not have.
    """
    layout = of_model(model, names)
    state = model.state_dict()
    for key, value in state.items():
        if value.is_meta:
            raise PlanError(f"{key} is on the meta device: it has no values to write")
        if value.dtype not in DTYPES:
            raise PlanError(f"{key} is {value.dtype}, which is not written")
    kept: dict[str, Checkpoint] = {}
    tensors: dict[str, Tensor] = {}
    for name, shape in layout.hub.items():
        original = source.tensors.get(name) if source is not None else None
        value = state[layout.keys(name)[0]]
        if (
            source is not None
            and original is not None
            and _narrowed(source, original, name, layout, state)
        ):
            kept[name] = source
            tensors[name] = Tensor(name, original.dtype, original.shape, name, 0, original.nbytes)
        else:
            count = int(np.prod(shape, dtype=np.int64))
            tensors[name] = Tensor(
                name, DTYPES[value.dtype], shape, name, 0, count * value.element_size()
            )
    for name in layout.outside:
        if source is not None and name in source.tensors:
            original = source.tensors[name]
            kept[name] = source
            tensors[name] = Tensor(name, original.dtype, original.shape, name, 0, original.nbytes)
    uri = f"memory:{type(model).__name__}"
    # The name is new each time: an interrupted export of other values under the same header is not
    # resumed.
    shard = Shard(f"{uri}-{uuid.uuid4()}", sum(t.nbytes for t in tensors.values()), tensors)
    held = MemorySource(uri, layout, state, kept, {} if source is not None else _generation(model))
    return Checkpoint(
        uri=uri,
        source=held,
        files=MappingProxyType(held.files()),
        shards=(shard,),
        index=None,
        config=_config(model, source),
        hf_quant_config=None,
        problems=(),
    )


def _narrowed(
    source: Checkpoint,
    original: Tensor,
    name: str,
    layout: Layout,
    state: Mapping[str, torch.Tensor],
) -> bool:
    """Whether the model holds a float32 tensor of its source narrower, and otherwise unchanged."""
    value = state[layout.keys(name)[0]]
    if (
        original.dtype != "F32"
        or value.dtype not in (torch.bfloat16, torch.float16)
        or original.shape != layout.hub[name]
    ):
        return False
    wide = torch.from_numpy(source.array(original).copy())
    return torch.equal(wide.to(value.dtype), layout.hub_tensor(name, state).cpu())


def _generation(model: Any) -> dict[str, bytes]:
    """Return generation_config.json as `save_pretrained` would write it, where the model
    generates.
    """
    found = getattr(model, "generation_config", None) if model.can_generate() else None
    return {} if found is None else {"generation_config.json": found.to_json_string().encode()}


def _config(model: Any, source: Checkpoint | None) -> dict[str, Any]:
    """Return the source's config, else what `save_pretrained` would write."""
    if source is not None and isinstance(source.config, Mapping):
        return {k: v for k, v in source.config.items() if k != "quantization_config"}
    found: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    found["architectures"] = [type(model).__name__]
    found["dtype"] = str(model.dtype).removeprefix("torch.")
    return found
