# SPDX-License-Identifier: Apache-2.0
"""A model of transformers that is run layer by layer: one layer's weights in memory at a time.

A stage is a step of the forward pass: 0 the embeddings, 1 to L the layers, L + 1 the final norm and
the head. Stage 0 gives the hidden states that layer 1 takes. To run a stage, transformers' own
forward is called; the other layers hand on what they are given, so masks, positions and everything
between layers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError
from verifier.load import hf
from verifier.load.activations import stack_names
from verifier.load.experts import is_experts_module
from verifier.load.model import Change, decoded_tensors, model_class
from verifier.schemes import canonical, role

_ASIDE = frozenset({"mtp", "vision", "projector"})
"""Roles of modules that text does not pass through."""


class _Reached(Exception):
    """Ends a forward pass at a layer; holds that layer's hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight is used: its stage, and the path of its module within the layer (within the
    model for stages without a layer).
    """

    stage: int
    module: str


class StreamedModel:
    """A checkpoint's model without weights; `stage` loads those of one layer for a while.

    Args:
        checkpoint: the checkpoint.
        device: where it runs.
        change: what is done to each module's weight after decoding.
        without_float32: hub tensors that stay in BF16 although the file has float32.

    Raises:
        ContentError: the model cannot be built, or has no list of decoder layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        change: Change | None = None,
        without_float32: frozenset[str] = frozenset(),
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        cls, config = model_class(checkpoint)
        attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
        self.model = hf.empty_model(checkpoint.uri, cls, config, attention)
        self.layers = decoder_layers(checkpoint.uri, self.model)
        paths = {id(module): path for path, module in self.model.named_modules()}
        self._prefixes = [f"{paths[id(layer)]}." for layer in self.layers]
        self._state = decoded_tensors(checkpoint, change)
        self._keys = hf.parameter_keys(self.model, self._state)
        self._by_stage: dict[int, list[str]] = {}
        for name, key in self._keys.items():
            if role(name) not in _ASIDE:
                self._by_stage.setdefault(self._stage_of(key.name), []).append(name)
        float32 = {t.name for t in checkpoint.tensors.values() if t.dtype == "F32"}
        self._float32 = {n for n in float32 - without_float32 if canonical(n) == n}
        self.chosen: torch.Tensor | None = None
        self._stage, self._hidden = 0, torch.zeros(0)
        self._in_tuple = False
        for number, layer in enumerate(self.layers, 1):
            layer.forward = partial(self._forward, number, layer.forward)
        for module in self.model.modules():
            if is_experts_module(module):
                module.register_forward_pre_hook(self._note_choice, with_kwargs=True)
        self._fill(0)
        self.model.tie_weights()
        self._require_filled(0)

    @property
    def head(self) -> int:
        """The number of the last stage."""
        return len(self.layers) + 1

    def places(self) -> dict[str, Place]:
        """Return where each module of the checkpoint is used, by its hub name; experts that a
        family stacks are all in one place.
        """
        stacks = stack_names(self.checkpoint)
        names = {name: name for name in self._keys} | stacks
        places = {}
        for name, source in names.items():
            if source not in self._keys or role(name) in _ASIDE:
                continue
            stage = self._stage_of(self._keys[source].name)
            path = self._keys[source].name.rpartition(".")[0]
            if stage:
                path = f"{path}.".removeprefix(self._prefixes[stage - 1]).rstrip(".")
            elif not _is_embedding(self.model, path):
                stage = self.head
            places[name.rpartition(".")[0]] = Place(stage, path)
        return places

    def _stage_of(self, key: str) -> int:
        """Return the layer of a parameter, 0 for those that are always loaded."""
        return next((i for i, p in enumerate(self._prefixes, 1) if key.startswith(p)), 0)

    def root(self, stage: int) -> Any:
        """Return the module whose weights a stage uses."""
        return self.layers[stage - 1] if 0 < stage < self.head else self.model

    @contextmanager
    def loaded(self, stage: int) -> Iterator[None]:
        """Have a stage's weights in memory while the context is open; those of stages without a
        layer always are.

        Raises:
            ContentError: a weight is missing or does not fit.
        """
        if not 0 < stage < self.head:
            yield
            return
        layer = self.layers[stage - 1]
        computed = {
            (module, name): value
            for module in layer.modules()
            for name, value in module._buffers.items()
            if value is not None and not value.is_meta
        }
        self._fill(stage)
        self._require_filled(stage)
        try:
            yield
        finally:
            layer.to_empty(device="meta")
            for (module, name), value in computed.items():
                module._buffers[name] = value

    def _fill(self, stage: int) -> None:
        names = self._by_stage.get(stage, [])
        state = {name: self._state[name] for name in names}
        hf.fill(self.checkpoint.uri, self.model, state, self.device)
        keys = {name: self._keys[name] for name in names if name in self._float32}
        hf.restore_float32(self.model, self.checkpoint, keys, torch.bfloat16)

    def _require_filled(self, stage: int) -> None:
        """Refuse a stage with a weight that the checkpoint does not have."""
        if not stage:
            modules = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
            empty = [name for m in modules if m is not None for name, p in _tensors(m) if p.is_meta]
        else:
            empty = [name for name, p in _tensors(self.layers[stage - 1]) if p.is_meta]
        if empty:
            prefix = self._prefixes[stage - 1] if stage else "embeddings or head, "
            raise ContentError(
                f"{self.checkpoint.uri} has no tensor for {prefix}{min(empty)}; `ckptgate check` "
                "names what is missing"
            )

    def run(self, stage: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after a stage, BF16 [windows, tokens, width] on the CPU; after
        the last one the logits, on the device.

        Args:
            stage: its weights are loaded.
            ids: token ids, int64 [windows, tokens].
            hidden: the hidden states before the stage; not used by stage 0.
        """
        self._stage, self._hidden = stage, hidden.to(self.device)
        self.chosen = None
        try:
            output = self.model(input_ids=ids.to(self.device), use_cache=False)
        except _Reached as reached:
            return reached.hidden.cpu()
        logits: torch.Tensor = output.logits
        return logits

    def _forward(self, stage: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand for a layer: run it where it is the stage, else hand on the hidden states."""
        if self._stage == 0:
            raise _Reached(args[0] if args else kwargs["hidden_states"])
        if stage < self._stage:
            return (self._hidden,) if self._in_tuple else self._hidden
        kwargs.pop("hidden_states", None)
        output = forward(self._hidden, *args[1:], **kwargs)
        self._in_tuple = isinstance(output, tuple)
        raise _Reached(output[0] if self._in_tuple else output)

    def _note_choice(self, _module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep a router's choice, int64 [tokens, k]."""
        for value in (*args[1:], *kwargs.values()):
            if getattr(value, "ndim", 0) >= 2 and not value.is_floating_point():
                self.chosen = value.reshape(-1, value.shape[-1]).cpu()
                return


def _tensors(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _is_embedding(model: Any, path: str) -> bool:
    return model.get_submodule(path) is model.get_input_embeddings()


def decoder_layers(uri: str, model: Any) -> Sequence[Any]:
    """Return the decoder layers of a transformers model, in order.

    Raises:
        ContentError: its decoder has no list of layers.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        raise ContentError(f"{uri}: {type(model).__name__} has no list of layers to run one by one")
    return list(layers)
