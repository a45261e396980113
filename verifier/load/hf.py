# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, built for a checkpoint: config, class, tensor names, float32 tensors.

The one module that touches transformers' conversion internals (read from transformers 5.12 to
5.23). It decodes nothing: `verifier.load.model` and `exporter.calibration` bring the values, each
by its own decoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from verifier.checkpoint import Checkpoint, Tensor, special_floats
from verifier.errors import ContentError, MissingExtra
from verifier.text import counted

try:
    import torch
    import transformers
    from transformers import conversion_mapping, core_model_loading
    from transformers.modeling_utils import LoadStateDictConfig
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
"""What transformers raises where a config does not describe a model that it can build."""
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""The dtypes of a model's unquantized tensors, by their names in safetensors."""
MAX_LAYERS = 10_000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def one_line(error: Exception) -> str:
    """Return an error's text on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings, progress bars and loading reports while the context is open.

    What they would report is raised or returned.
    """
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def read_config(uri: str, config: Mapping[str, Any]) -> Any:
    """Return transformers' config object for a parsed config.json, without its quantization.

    Code that a checkpoint brings along never runs: ``auto_map`` is not read.

    Args:
        uri: where the config is from, for messages.
        config: the parsed config.json; it is not changed.

    Raises:
        ContentError: this version of transformers does not know the model type, cannot read the
            config, or the config declares more than `MAX_LAYERS` layers.
    """
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    model_type = plain.get("model_type")
    if model_type is None:
        raise ContentError(f"{uri}: config.json has no model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ContentError(
            f"{uri}: transformers {transformers.__version__} does not know the model_type "
            f'"{model_type}"'
        )
    try:
        excess = next(_excessive_counts(plain), None)
        if excess is not None:
            raise ContentError(f"{uri}: config.json declares {excess}")
        # special_floats copies: transformers 5.12 removes what it reads from nested objects.
        return transformers.AutoConfig.for_model(**special_floats(plain))
    except BUILD_ERRORS as error:
        raise ContentError(
            f"{uri}: transformers {transformers.__version__} cannot read config.json: "
            f"{one_line(error)}"
        ) from error


def _excessive_counts(node: Any) -> Iterator[str]:
    """Yield layer counts that no model has: each layer is a module to build, even on meta."""
    for key, value in node.items() if isinstance(node, dict) else ():
        is_count = any(word in str(key) for word in ("layers", "depth", "blocks"))
        if is_count and type(value) is int and value > MAX_LAYERS:
            yield f"{key} = {value:,}"
        yield from _excessive_counts(value)


def architecture_of(config: Any) -> str | None:
    """Return the first architecture that a config names, or None."""
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    return name if isinstance(name, str) else None


def class_of(uri: str, config: Any) -> Any:
    """Return the class of transformers that a config's architecture names.

    Raises:
        ContentError: this version of transformers has no such class.
    """
    architecture = architecture_of(config)
    cls = getattr(transformers, architecture or "", None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    if architecture is None:
        raise ContentError(f"{uri}: config.json names no architecture")
    raise ContentError(
        f"{uri}: transformers {transformers.__version__} has no architecture {architecture}"
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return a checkpoint's own tokenizer, or None where it has no tokenizer files.

    Raises:
        ContentError: the files cannot be read.
    """
    if not any(name in checkpoint.files for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                checkpoint.uri, trust_remote_code=False, local_files_only=True
            )
    except (OSError, *BUILD_ERRORS) as error:
        raise ContentError(
            f"{checkpoint.uri}: its tokenizer cannot be read: {one_line(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class ParameterKey:
    """Which parameter or buffer a hub tensor becomes.

    ``converter`` is the pattern of the conversion that it goes through (it is then only a part or
    a different shape of that parameter), None where it is only renamed.
    """

    name: str
    converter: str | None


class KeyMapping:
    """The renamings and converters of one model, applied as transformers' loader applies them."""

    def __init__(self, model: Any) -> None:
        mapping = conversion_mapping.get_model_conversion_mapping(model)
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._renamings = [m for m in mapping if isinstance(m, core_model_loading.WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, core_model_loading.WeightConverter)]

    def keys(self, names: Iterable[str]) -> dict[str, ParameterKey]:
        """Return the parameter of each hub name, in the loader's natural order of names."""
        return {name: self._key(name) for name in sorted(names, key=natural)}

    def _key(self, name: str) -> ParameterKey:
        key, pattern = self._rename(name, self._renamings, self._converters)
        if key not in self._state and name in self._state:
            # The loader's own rule: a pattern matches a name by accident that is right already.
            key, pattern = self._rename(name, [], [])
        return ParameterKey(key, pattern)

    def _rename(
        self, name: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = core_model_loading.rename_source_key(
            name, renamings, converters, self._prefix, self._state
        )
        return renamed

    def converter(self, pattern: str) -> Any:
        """Return the converter that has a source pattern."""
        by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        return by_pattern[pattern]


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key in which ``experts.2`` comes before ``experts.10``."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]


def parameter_keys(model: Any, names: Iterable[str]) -> dict[str, ParameterKey]:
    """Return the parameter or buffer that transformers' loader makes of each hub tensor."""
    return KeyMapping(model).keys(names)


def saved_tensors(model: Any, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the hub tensors that `save_pretrained` would write for a state dict.

    Raises:
        Exception: one of `BUILD_ERRORS`, where transformers cannot revert its own conversion.
    """
    found: Mapping[str, torch.Tensor] = core_model_loading.revert_weight_conversion(
        model, dict(state)
    )
    return found


def load_shapes(uri: str, cls: Any, config: Any, state: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a model on the meta device and transformers' loading report for a state dict.

    The steps of ``PreTrainedModel.from_pretrained``, which raises where a conversion fails and does
    not report what else is wrong.

    Args:
        uri: the checkpoint's, for messages.
        cls: the model's class.
        config: its config.
        state: by hub name what gives a tensor on the meta device when it is sliced.

    Raises:
        ContentError: the model cannot be built, or its loading cannot be finished.
    """
    dtype = torch.bfloat16
    with quiet():
        try:
            with torch.device("meta"):
                model = cls(config)
            mapping: list[Any] = list(conversion_mapping.get_model_conversion_mapping(model))
            settings = LoadStateDictConfig(
                ignore_mismatched_sizes=True,
                device_map={"": "meta"},
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                weight_mapping=mapping,
            )
            report, _ = cls._load_pretrained_model(model, state, None, settings)
        except BUILD_ERRORS as error:
            raise ContentError(
                f"{uri}: transformers cannot build the model: {one_line(error)}"
            ) from error
        try:
            cls._finalize_model_loading(model, settings, report)
        except BUILD_ERRORS as error:
            if not report.conversion_errors:  # with conversion errors it always raises
                raise ContentError(
                    f"{uri}: transformers cannot finish loading: {one_line(error)}"
                ) from error
    return model, report


def empty_model(uri: str, cls: Any, config: Any, attention: str) -> Any:
    """Return a model in evaluation mode whose parameters are on the meta device; what its modules
    compute for themselves, such as rotary frequencies, is on the CPU.

    Args:
        uri: the checkpoint's, for messages.
        cls: the model's class.
        config: its config.
        attention: transformers' attention implementation.

    Raises:
        ContentError: the model cannot be built.
    """
    with quiet():
        try:
            config._attn_implementation = attention
            with _default_dtype(torch.bfloat16), torch.device("meta"):
                model = cls(config)
            stored = model.state_dict().keys()
            for path, module in model.named_modules():
                own = [n for n in module._buffers if f"{path}.{n}".lstrip(".") not in stored]
                for name in own:
                    if module._buffers[name] is not None:
                        module._buffers[name] = torch.empty_like(
                            module._buffers[name], device="cpu"
                        )
                if own:
                    model._init_weights(module)
        except BUILD_ERRORS as error:
            raise ContentError(
                f"{uri}: transformers cannot build the model: {one_line(error)}"
            ) from error
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fill(uri: str, model: Any, state: Mapping[str, Any], device: str) -> None:
    """Give parameters of an `empty_model` their values, in BF16, by the steps of
    ``PreTrainedModel.from_pretrained``.

    Args:
        uri: the checkpoint's, for messages.
        model: the model.
        state: some tensors by hub name; each gives its values when it is sliced.
        device: where the parameters go.

    Raises:
        ContentError: a tensor that cannot be converted, or has a different shape.
    """
    mapping: list[Any] = list(conversion_mapping.get_model_conversion_mapping(model))
    settings = LoadStateDictConfig(
        ignore_mismatched_sizes=True,
        device_map={"": device},
        dtype=torch.bfloat16,
        dtype_plan=model._get_dtype_plan(torch.bfloat16),
        weight_mapping=mapping,
    )
    with quiet():
        try:
            report, _ = type(model)._load_pretrained_model(model, state, None, settings)
        except BUILD_ERRORS as error:
            raise ContentError(
                f"{uri}: transformers cannot load a part of the model: {one_line(error)}"
            ) from error
    faults = [*map(str, report.mismatched_keys), *map(str, report.conversion_errors)]
    if faults:
        raise ContentError(f"{uri}: {min(faults)} cannot be loaded: a different shape")


def require_complete(uri: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers' loading report lists missing or mismatched keys.

    Raises:
        ContentError: naming the first key.
    """
    keys = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
    if keys:
        raise ContentError(
            f"{uri}: {counted(len(keys), 'key')} of the model missing or with a different shape, "
            f"{keys[0]} first"
        )


def plain_tensor(checkpoint: Checkpoint, tensor: Tensor) -> torch.Tensor:
    """Return an unquantized tensor in its own dtype and shape.

    Raises:
        ContentError: a dtype that a model's weights do not have.
    """
    if tensor.dtype not in DTYPES:
        raise ContentError(
            f"{tensor.name}: {tensor.dtype} without a scale; a model cannot be built from it"
        )
    data = torch.from_numpy(checkpoint.read(tensor).copy())
    return data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def restore_float32(
    model: Any, checkpoint: Checkpoint, keys: Mapping[str, ParameterKey], dtype: torch.dtype
) -> tuple[str, ...]:
    """Give tensors that the file holds in float32 their values back; return their names.

    ``from_pretrained`` casts them to the model's dtype, and transformers has no public way to
    exclude one by hub name. Stacked tensors are converted, not renamed: they keep the model's
    dtype, as do matrices of modules that cannot run in two dtypes.

    Args:
        model: built by transformers from the checkpoint.
        checkpoint: the checkpoint.
        keys: which parameter each candidate is, by hub name.
        dtype: of the model's activations.
    """
    state = model.state_dict()
    restored = []
    for name, key in keys.items():
        tensor, present = checkpoint.tensors[name], state.get(key.name)
        if key.converter is not None or present is None or present.is_meta:
            continue
        if tensor.dtype != "F32" or tuple(present.shape) != tensor.shape:
            continue
        path, _, leaf = key.name.rpartition(".")
        module = model.get_submodule(path)
        value = plain_tensor(checkpoint, tensor).to(present.device)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        elif not _restore_parameter(module, leaf, value, dtype):
            continue
        restored.append(name)
    return tuple(restored)


def _restore_parameter(module: Any, leaf: str, value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Set a parameter to float32; undo it where the module then cannot take ``dtype``, or turns it
    into float32 for the modules that follow.
    """
    before = module._parameters[leaf]
    module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    if value.ndim == 1:
        if _keeps_dtype(module, value.shape[0], dtype):
            return True
    elif value.ndim != 2 or _accepts(module, value, dtype):
        return True
    module._parameters[leaf] = before
    return False


def _keeps_dtype(module: Any, width: int, dtype: torch.dtype) -> bool:
    """Whether a module with a float32 vector still turns hidden states of a dtype into that dtype.

    Llama's norm with a float32 weight returns float32, which the next layer refuses; a linear layer
    refuses a float32 bias next to a weight of a different dtype. A module that is not called with
    hidden states of ``width``, such as a router with a float32 correction bias, is left alone.
    """
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    if weight is not None and bias is not None and weight.ndim == 2:
        return bool(weight.dtype == bias.dtype)
    hidden = torch.zeros((1, width), dtype=dtype, device=next(module.parameters()).device)
    try:
        with torch.inference_mode():
            output = module(hidden)
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        return True
    return not isinstance(output, torch.Tensor) or output.dtype == dtype


def _accepts(module: Any, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a module takes hidden states of a dtype with its weight in float32.

    MiniMax-M3's router does, Qwen3-MoE's does not.
    """
    try:
        with torch.inference_mode():
            module(torch.zeros((1, weight.shape[1]), dtype=dtype, device=weight.device))
    except (RuntimeError, TypeError, IndexError):
        return False
    return True
