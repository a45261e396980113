# SPDX-License-Identifier: Apache-2.0
"""Decode a checkpoint tensor by tensor and let transformers build the model from it.

transformers is not a reliable reference for quantized experts (huggingface/transformers#48371). It
receives plain BF16 values (float32 where the file has float32), decoded by `verifier.decoding`,
under hub names; its own conversion mapping does the rest. Tensors are decoded when transformers
reads them, so memory holds the model and a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verifier.checkpoint import Checkpoint, Tensor, open_checkpoint
from verifier.decoding import decode
from verifier.errors import ContentError, MissingExtra
from verifier.layouts.expert_stacks import expanded, restacked, stack_layout_of, unstacked
from verifier.schemes import (
    FLOATS,
    FORMATS,
    Format,
    Module,
    canonical,
    declared_formats,
    format_of,
    gather,
    read_declarations,
)

try:
    import torch

    from verifier.load import hf
except ImportError as error:
    raise MissingExtra("loading a model", "load") from error


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a module's name and its decoded weight; returns the weight that the model gets."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what transformers' loading report said."""

    model: Any
    unexpected: tuple[str, ...]
    float32: tuple[str, ...]


class _LazyTensor:
    """Represents a tensor that is decoded when transformers slices it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: Module,
        leaf: str,
        fmt: Format | None,
        change: Change | None = None,
    ) -> None:
        self._checkpoint, self._module, self._leaf, self._format = checkpoint, module, leaf, fmt
        self._change = change

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded tensor."""
        tensor = self._module.parts[self._leaf]
        if self._format is None or not tensor.shape:
            return tensor.shape
        if self._leaf != "blocks":
            if self._module.dims is not None:
                return self._module.dims
            return (*tensor.shape[:-1], tensor.shape[-1] * (2 if self._format.packed else 1))
        if len(tensor.shape) < 2:
            return tensor.shape
        shape = (*tensor.shape[:-2], 32 * tensor.shape[-2])  # from [..., in / 32, 16]
        return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape

    def __getitem__(self, _index: Any) -> torch.Tensor:
        values = self._values()
        return values if self._change is None else self._change(self._module.name, values)

    def _values(self) -> torch.Tensor:
        if self._format is None:
            return hf.plain_tensor(self._checkpoint, self._module.parts[self._leaf])
        parts = {leaf: self._checkpoint.array(t) for leaf, t in self._module.parts.items()}
        values = torch.from_numpy(decode(parts, self._format)).to(torch.bfloat16)
        if "blocks" in parts and values.ndim == 3:
            # gpt-oss stores its stacks [expert, out, in] in MXFP4, and [expert, in, out] otherwise.
            return values.transpose(-1, -2).contiguous()
        return values

    @property
    def logical(self) -> tuple[int, ...]:
        """The shape of one expert's weight or bias, in elements."""
        if self._format is not None and self._module.dims:
            return self._module.dims
        return self._module.parts[self._leaf].shape


class _LazyStack:
    """Represents a stack of experts' weights or biases, stacked when transformers slices it."""

    def __init__(
        self, parts: list[_LazyTensor], projections: int, *, transposed: bool, interleaved: bool
    ) -> None:
        self._experts = [
            parts[start : start + projections] for start in range(0, len(parts), projections)
        ]
        self._transposed, self._interleaved = transposed, interleaved

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stack."""
        shapes = [part.logical for part in self._experts[0]]
        inner = (sum(s[0] for s in shapes), *shapes[0][1:])
        return (len(self._experts), *(inner[::-1] if self._transposed else inner))

    def __getitem__(self, _index: Any) -> torch.Tensor:
        experts = []
        for parts in self._experts:
            values = [part[...] for part in parts]
            if self._interleaved:
                joined = torch.stack(values, 1).flatten(0, 1)
            else:
                joined = torch.cat(values)
            experts.append(joined.T if self._transposed and joined.ndim == 2 else joined)
        return torch.stack(experts).contiguous()


def decoded_tensors(
    checkpoint: Checkpoint, change: Change | None = None
) -> dict[str, _LazyTensor | _LazyStack]:
    """Return every weight of a checkpoint by its unquantized hub name, decoded on access.

    Experts that a family's hub keeps in stacks are stacked, also where the checkpoint holds them
    individually.

    Args:
        checkpoint: the checkpoint.
        change: what is done to each module's weight after decoding.

    Raises:
        ContentError: a quantized weight whose format cannot be inferred, or transforms that a
            reader applies to activations.
    """
    checkpoint = unstacked(checkpoint)
    declaration = expanded(read_declarations(checkpoint).effective, checkpoint)
    if declaration is not None and declaration.transforms:
        raise ContentError(
            f"{checkpoint.uri}: {declaration.file} declares transforms of activations "
            f"({', '.join(declaration.transforms)[:200]}), which are not applied here; score it "
            "with an engine that applies them (--scorer vllm)"
        )
    tensors: dict[str, _LazyTensor] = {}
    for module in gather(checkpoint.tensors.values(), declared_formats(declaration)).values():
        for leaf, tensor in module.parts.items():
            name = canonical(tensor.name)
            if name is None:
                continue
            fmt = None
            if tensor is module.weight and module.quantized:
                mxfp4 = "blocks" in module.parts
                fmt = FORMATS["mxfp4"] if mxfp4 else format_of(module, declaration)
                if fmt is None:
                    raise ContentError(
                        f"{tensor.name}: {tensor.dtype}, and its quantization format cannot be "
                        "inferred; run ckptgate check"
                    )
            elif tensor.dtype not in FLOATS and _is_metadata(tensor):
                continue
            its_change = change if tensor is module.weight else None
            tensors[name] = _LazyTensor(checkpoint, module, leaf, fmt, its_change)
    return _restacked(tensors, checkpoint)


def _is_metadata(tensor: Tensor) -> bool:
    """Whether an integer tensor belongs to no buffer (such as compressed-tensors' weight_shape)."""
    return tensor.dtype not in hf.DTYPES or "weight_" in tensor.name


def _restacked(
    tensors: dict[str, _LazyTensor], checkpoint: Checkpoint
) -> dict[str, _LazyTensor | _LazyStack]:
    """Return tensors with the experts of stacking families in stacks, as transformers' own mapping
    takes them.
    """
    result: dict[str, _LazyTensor | _LazyStack] = dict(tensors)
    layout = stack_layout_of(checkpoint.config)
    for stack in restacked(tensors, checkpoint.config):
        result[stack.name] = _LazyStack(
            [tensors[part] for part in stack.parts],
            len(stack.projections),
            transposed=bool(layout and layout.transposed) and stack.leaf == "weight",
            interleaved=bool(layout and layout.interleaved),
        )
        for part in stack.parts:
            del result[part]
    return result


def load_model(
    checkpoint: Checkpoint | str, *, device: str = "cpu", attention: str | None = None
) -> LoadedModel:
    """Return the checkpoint's model in BF16, with float32 for the tensors that the file holds in
    float32.

    Args:
        checkpoint: what to load, opened or by path.
        device: where the parameters go.
        attention: transformers' attention implementation; by default ``sdpa``, or ``eager`` for
            classes without it.

    Raises:
        ContentError: a tensor that cannot be decoded, keys that are missing or have a different
            shape, an unknown architecture.
    """
    ckpt = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    cls, config = model_class(ckpt)
    state = decoded_tensors(ckpt)
    implementation = attention or ("sdpa" if getattr(cls, "_supports_sdpa", False) else "eager")
    # device_map needs accelerate
    placement: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}

    def load(attn_implementation: str) -> tuple[Any, Any]:
        with hf.quiet():
            loaded: tuple[Any, Any] = cls.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.bfloat16,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **placement,
            )
        return loaded

    try:
        try:
            model, info = load(implementation)
        except ValueError as error:
            # A part of the model may lack what its class claims (Gemma4's audio tower).
            if attention or implementation == "eager" or "attention" not in str(error):
                raise
            model, info = load("eager")
    except hf.BUILD_ERRORS as error:
        raise ContentError(
            f"{ckpt.uri}: transformers cannot build the model: {hf.one_line(error)}"
        ) from error
    hf.require_complete(ckpt.uri, info)
    names = [t.name for t in ckpt.tensors.values() if t.dtype == "F32"]
    keys = hf.parameter_keys(model, (n for n in names if canonical(n) == n))
    float32 = hf.restore_float32(model, ckpt, keys, torch.bfloat16)
    return LoadedModel(model.eval(), tuple(sorted(info["unexpected_keys"])), float32)


def model_class(ckpt: Checkpoint) -> tuple[Any, Any]:
    """Return the class of transformers that config.json names, and the config without its
    quantization.

    Raises:
        ContentError: no config.json, or one that this version of transformers has no class for.
    """
    if ckpt.config is None:
        raise ContentError(f"{ckpt.uri}: no config.json to build a model from")
    config = hf.read_config(ckpt.uri, ckpt.config)
    return hf.class_of(ckpt.uri, config), config
