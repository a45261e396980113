# SPDX-License-Identifier: Apache-2.0
"""Decode a checkpoint tensor by tensor and let transformers build the model from it.

transformers is no oracle for quantized experts (huggingface/transformers#48371): it is given plain
BF16 values (float32 where the file is), decoded by `verifier.decoding`, under hub names, and its
own conversion mapping does the rest. Tensors are decoded when transformers asks for them, so memory
holds the model and a few tensors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from verifier.checkpoint import Checkpoint, Tensor, open_checkpoint, special_floats
from verifier.decoding import decode
from verifier.errors import ContentError, MissingExtra
from verifier.layouts.expert_stacks import expanded, restacked, stacking_of, unstacked
from verifier.schemes import (
    FLOATS,
    FORMATS,
    Format,
    Module,
    canonical,
    format_of,
    gather,
    read_declarations,
)

try:
    import torch
    import transformers
except ImportError as error:
    raise MissingExtra("loading a model", "load") from error

BUILD_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    IndexError,
    NotImplementedError,
    StrictDataclassError,
)
"""What transformers raises where a config does not make a model of it."""
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what transformers' loading report said."""

    model: Any
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    float32: tuple[str, ...]


class _Lazy:
    """Stands for a tensor that is decoded when transformers slices it."""

    def __init__(
        self, checkpoint: Checkpoint, module: Module, leaf: str, fmt: Format | None
    ) -> None:
        self._checkpoint, self._module, self._leaf, self._format = checkpoint, module, leaf, fmt

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        tensor = self._module.parts[self._leaf]
        if self._format is None or not tensor.shape:
            return tensor.shape
        if self._leaf == "blocks":  # [..., in / 32, 16]
            shape = (
                (*tensor.shape[:-2], 32 * tensor.shape[-2])
                if len(tensor.shape) > 1
                else tensor.shape
            )
            return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
        return (*tensor.shape[:-1], tensor.shape[-1] * (2 if self._format.packed else 1))

    def __getitem__(self, _index: Any) -> torch.Tensor:
        if self._format is not None:
            parts = {leaf: self._checkpoint.array(t) for leaf, t in self._module.parts.items()}
            values = torch.from_numpy(decode(parts, self._format.name)).to(torch.bfloat16)
            # gpt-oss stores its stacks [expert, out, in] in MXFP4, and [expert, in, out] otherwise.
            return (
                values.transpose(-1, -2).contiguous()
                if "blocks" in parts and values.ndim == 3
                else values
            )
        return plain(self._checkpoint, self._module.parts[self._leaf])

    @property
    def logical(self) -> tuple[int, ...]:
        """The shape of one expert's weight or bias, in elements."""
        return (
            self._module.dims
            if self._format is not None and self._module.dims
            else self._module.parts[self._leaf].shape
        )


class _Stacked:
    """Stands for a stack of experts' weights or biases, put together when transformers slices
    it.
    """

    def __init__(self, parts: list[_Lazy], each: int, turned: bool, woven: bool) -> None:
        self._parts, self._each, self._turned, self._woven = parts, each, turned, woven

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        own = [p.logical for p in self._parts[: self._each]]
        inner = (sum(s[0] for s in own), *own[0][1:])
        return (len(self._parts) // self._each, *(inner[::-1] if self._turned else inner))

    def __getitem__(self, _index: Any) -> torch.Tensor:
        experts = []
        for start in range(0, len(self._parts), self._each):
            own = [p[...] for p in self._parts[start : start + self._each]]
            joined = torch.stack(own, 1).flatten(0, 1) if self._woven else torch.cat(own)
            experts.append(joined.T if self._turned and joined.ndim == 2 else joined)
        return torch.stack(experts).contiguous()


def plain(checkpoint: Checkpoint, tensor: Tensor) -> torch.Tensor:
    """Return an unquantized tensor in its own dtype.

    Raises:
        ContentError: a dtype that a model's weights do not have.
    """
    if tensor.dtype not in _DTYPES:
        raise ContentError(
            f"{tensor.name}: {tensor.dtype} and no scale; a model cannot be built from it"
        )
    data = torch.from_numpy(checkpoint.read(tensor).copy())
    return data.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)


_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
}


def decoded_tensors(checkpoint: Checkpoint) -> dict[str, _Lazy | _Stacked]:
    """Return every weight of a checkpoint by its unquantized hub name, decoded on access.

    Experts that a family's hub keeps in stacks are stacked, also where the checkpoint holds them
    one by one.

    Raises:
        ContentError: a quantized weight whose format cannot be told.
    """
    checkpoint = unstacked(checkpoint)
    declaration = expanded(read_declarations(checkpoint).effective, checkpoint)
    found: dict[str, _Lazy] = {}
    for module in gather(checkpoint.tensors.values()).values():
        for leaf, tensor in module.parts.items():
            name = canonical(tensor.name)
            if name is None:
                continue
            fmt = None
            if tensor is module.weight and module.quantized:
                fmt = (
                    FORMATS["mxfp4"] if "blocks" in module.parts else format_of(module, declaration)
                )
                if fmt is None:
                    raise ContentError(
                        f"{tensor.name}: {tensor.dtype}, and its format cannot be told; run check first"
                    )
            elif tensor.dtype not in FLOATS and (
                tensor.dtype not in _DTYPES or "weight_" in tensor.name
            ):
                continue  # weight_shape of compressed-tensors and its like; other whole numbers are buffers
            found[name] = _Lazy(checkpoint, module, leaf, fmt)
    return _restacked(found, checkpoint)


def _restacked(found: dict[str, _Lazy], checkpoint: Checkpoint) -> dict[str, _Lazy | _Stacked]:
    """Return tensors with the experts of stacking families in stacks, as transformers' own mapping
    takes them.
    """
    result: dict[str, _Lazy | _Stacked] = dict(found)
    stacking = stacking_of(checkpoint.config)
    for name, (leaf, parts) in restacked(found, checkpoint.config).items():
        if stacking is None:
            break
        each = len(next(v for s, v in stacking.stacks.items() if name.endswith((s, f"{s}_bias"))))
        result[name] = _Stacked(
            [found[p] for p in parts],
            each,
            bool(stacking.turned) and leaf == "weight",
            stacking.woven,
        )
        for part in parts:
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
        ContentError: a tensor that cannot be decoded, keys that are missing or of other shape, an
            unknown architecture.
    """
    ckpt = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    cls, config = model_class(ckpt)
    state = decoded_tensors(ckpt)
    chosen = attention or ("sdpa" if getattr(cls, "_supports_sdpa", False) else "eager")
    place: dict[str, Any] = (
        {} if device == "cpu" else {"device_map": {"": device}}
    )  # which takes accelerate

    def load(how: str) -> tuple[Any, Any]:
        with quiet():
            found: tuple[Any, Any] = cls.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.bfloat16,
                attn_implementation=how,
                output_loading_info=True,
                **place,
            )
        return found

    try:
        try:
            model, info = load(chosen)
        except ValueError as error:
            # A part of the model may lack what its class says it has (Gemma4's audio tower).
            if attention or chosen == "eager" or "attention" not in str(error):
                raise
            model, info = load("eager")
    except BUILD_ERRORS as error:
        raise ContentError(
            f"{ckpt.uri}: transformers cannot build the model: {short(error)}"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(str(k) for k in info["missing_keys"]) or sorted(
            str(k) for k in info["mismatched_keys"]
        )
        raise ContentError(
            f"{ckpt.uri}: {len(names)} keys of the model are missing or of another shape, {names[0]} first"
        )
    kept = _restore_float32(model, ckpt)
    return LoadedModel(model.eval(), (), tuple(sorted(info["unexpected_keys"])), kept)


def short(error: Exception) -> str:
    """Return an error's text on one line, not too long."""
    return " ".join(str(error).split())[:300]


def model_class(ckpt: Checkpoint) -> tuple[Any, Any]:
    """Return the class of transformers that config.json names, and the config without its
    quantization.

    Code that a checkpoint brings along is never run: ``auto_map`` is not read.

    Raises:
        ContentError: no config.json, or one that this version of transformers has no class for.
    """
    if ckpt.config is None:
        raise ContentError(f"{ckpt.uri}: no config.json to build a model from")
    config = _config(ckpt)
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ContentError(
            f"{ckpt.uri}: transformers {transformers.__version__} has no architecture {architecture!r}"
        )
    return cls, config


def _config(ckpt: Checkpoint) -> Any:
    raw = {
        k: v for k, v in (ckpt.config or {}).items() if k not in ("quantization_config", "auto_map")
    }
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ContentError(
            f"{ckpt.uri}: transformers {transformers.__version__} has no model_type {kind!r}"
        )
    try:
        many = next(_too_many(raw), None)
        if many is not None:
            raise ContentError(f"{ckpt.uri}: config.json declares {many}")
        # A copy: transformers 5.12 takes what it reads out of nested objects.
        return transformers.AutoConfig.for_model(**special_floats(raw))
    except BUILD_ERRORS as error:
        raise ContentError(
            f"{ckpt.uri}: transformers cannot read config.json: {short(error)}"
        ) from error


def _too_many(node: Any) -> Iterator[str]:
    """Yield the numbers of layers that no model has: each is a module to build, on the meta device
    too.
    """
    for key, value in node.items() if isinstance(node, dict) else ():
        if (
            type(value) is int
            and value > MAX_LAYERS
            and any(word in str(key) for word in ("layers", "depth", "blocks"))
        ):
            yield f"{key} = {value:,}"
        yield from _too_many(value)


def _restore_float32(model: Any, ckpt: Checkpoint) -> tuple[str, ...]:
    """Give back their float32 values to the tensors that from_pretrained cast to the model's dtype.

    transformers has no public way to say "this one stays float32" by hub name, so its own renaming
    is asked where each tensor went; stacked ones are not renamed but converted, and keep BF16, as
    do matrices of modules that cannot run in two dtypes.
    """
    wanted = [t for t in ckpt.tensors.values() if t.dtype == "F32" and canonical(t.name) == t.name]
    if not wanted:
        return ()
    state = model.state_dict()
    kept = []
    for tensor, (key, pattern) in zip(
        wanted, parameter_names(model, (t.name for t in wanted)), strict=True
    ):
        if pattern is not None or key not in state or tuple(state[key].shape) != tensor.shape:
            continue
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        value = plain(ckpt, tensor).to(state[key].device)
        before = module._parameters.get(leaf)
        if before is not None:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
            if value.ndim == 2 and not _runs(module, value):
                module._parameters[leaf] = before
                continue
        else:
            module._buffers[leaf] = value
        kept.append(tensor.name)
    return tuple(kept)


def parameter_names(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield, for each hub name, the parameter that the loader gives it to, and the pattern of its
    conversion or None.
    """
    # The conversion internals of transformers, here and in `verifier.load.reload`.
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    for name in names:
        yield rename_source_key(name, renamings, converters, model.base_model_prefix, state)


def _runs(module: Any, weight: torch.Tensor) -> bool:
    """Whether a module takes BF16 hidden states with its weight in float32 (MiniMax-M3's router
    does, Qwen3's not).
    """
    try:
        with torch.inference_mode():
            module(torch.zeros((1, weight.shape[1]), dtype=torch.bfloat16, device=weight.device))
    except (RuntimeError, TypeError, IndexError):
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports; what they would say is raised or
    returned.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
