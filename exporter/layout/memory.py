# SPDX-License-Identifier: Apache-2.0
"""A transformers model in memory, read as a checkpoint in hub layout: each hub tensor is cut out
when it is read.
"""

from __future__ import annotations

import json
import math
import threading
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from exporter.layout.grids import Shape
from exporter.layout.hf_mapping import of_model
from exporter.layout.layout import Layout
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
    """Hub tensors of a model, each a file of its own; tensors that the model has no place for are
    read from its source.
    """

    def __init__(
        self,
        uri: str,
        layout: Layout,
        state: Mapping[str, torch.Tensor],
        from_source: Mapping[str, Checkpoint],
        auxiliary: Mapping[str, bytes],
    ) -> None:
        self.uri = uri
        self._layout, self._state = layout, state
        self._from_source, self._auxiliary = from_source, auxiliary
        self._last = threading.local()  # a large tensor is read in chunks

    def files(self) -> dict[str, int]:
        """Return the auxiliary files."""
        return {name: len(raw) for name, raw in self._auxiliary.items()}

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return bytes of a hub tensor, from memory or from the source.

        Raises:
            MachineError: the tensor is shorter.
        """
        if name in self._auxiliary:
            return np.frombuffer(self._auxiliary[name], np.uint8)[offset : offset + length]
        if name in self._from_source:
            origin = self._from_source[name]
            tensor = origin.tensors[name]
            return origin.source.read(tensor.file, tensor.offset + offset, length)
        if getattr(self._last, "name", None) != name:
            value = self._layout.hub_tensor(name, self._state).contiguous().reshape(-1)
            self._last.raw, self._last.name = value.view(torch.uint8).cpu().numpy(), name
        raw: Bytes = self._last.raw[offset : offset + length]
        if raw.size != length:
            raise MachineError(f"{name}: {raw.size} bytes instead of {length}")
        return raw


def as_checkpoint(
    model: Any, source: Checkpoint | None = None, names: Mapping[str, Shape] | None = None
) -> Checkpoint:
    """Return a model as a checkpoint in hub layout; nothing is copied until it is read.

    Args:
        model: a transformers model whose parameters are on one host; unquantized.
        source: the checkpoint that it was loaded from: its index decides the layout. Tensors that
            the model has no place for (next-token-prediction heads), or holds in a narrower dtype
            but unchanged, are read from there.
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
            raise PlanError(f"{key} is on the meta device and has no values to write")
        if value.dtype not in DTYPES:
            raise PlanError(f"{key} is {value.dtype}, which ckptgate does not write")
    from_source: dict[str, Checkpoint] = {}
    tensors: dict[str, Tensor] = {}
    for name in (*layout.hub, *layout.outside):
        original = source.tensors.get(name) if source is not None else None
        outside = name not in layout.hub
        if source is not None and original is not None:
            if outside or _is_narrowed(source, original, layout, state):
                from_source[name] = source
                tensors[name] = original._replace(file=name, offset=0)
                continue
        if not outside:
            tensors[name] = _hub_tensor(name, layout, state)
    uri = f"memory:{type(model).__name__}"
    # A new name each time: an interrupted export of other values under the same header must not be
    # resumed.
    shard = Shard(f"{uri}-{uuid.uuid4()}", sum(t.nbytes for t in tensors.values()), tensors)
    auxiliary = {} if source is not None else _generation_config(model)
    memory = MemorySource(uri, layout, state, from_source, auxiliary)
    return Checkpoint(
        uri=uri,
        source=memory,
        files=MappingProxyType(memory.files()),
        shards=(shard,),
        index=None,
        config=_config(model, source),
        hf_quant_config=None,
        problems=(),
    )


def _hub_tensor(name: str, layout: Layout, state: Mapping[str, torch.Tensor]) -> Tensor:
    value, shape = state[layout.keys(name)[0]], layout.hub[name]
    nbytes = math.prod(shape) * value.element_size()
    return Tensor(name, DTYPES[value.dtype], shape, name, 0, nbytes)


def _is_narrowed(
    source: Checkpoint, original: Tensor, layout: Layout, state: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the model holds a float32 tensor of its source in a narrower dtype, otherwise
    unchanged.
    """
    name = original.name
    dtype = state[layout.keys(name)[0]].dtype
    if original.dtype != "F32" or original.shape != layout.hub[name]:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    wide = torch.from_numpy(source.array(original).copy())
    return torch.equal(wide.to(dtype), layout.hub_tensor(name, state).cpu())


def _generation_config(model: Any) -> dict[str, bytes]:
    """Return generation_config.json as `save_pretrained` would write it, where the model
    generates.
    """
    config = getattr(model, "generation_config", None) if model.can_generate() else None
    return {} if config is None else {"generation_config.json": config.to_json_string().encode()}


def _config(model: Any, source: Checkpoint | None) -> dict[str, Any]:
    """Return the source's config, else what `save_pretrained` would write."""
    if source is not None and isinstance(source.config, Mapping):
        return {k: v for k, v in source.config.items() if k != "quantization_config"}
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    return config
