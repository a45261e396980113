# SPDX-License-Identifier: Apache-2.0
"""Load a source with transformers' own loader, in the dtype that the file has; a quantized one is
decoded to BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from exporter.calibration.decoded import decoded_state
from exporter.layout.hf_mapping import Place, places
from verifier.checkpoint import Checkpoint, special_floats
from verifier.errors import PlanError, UsageError
from verifier.schemes import canonical, gather, role

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a source is quantized; transformers decodes few formats, so it is then given decoded
    values.
    """
    return any(m.quantized for m in gather(checkpoint.tensors.values()).values())


def load_source(checkpoint: Checkpoint, device: str) -> tuple[Any, dict[str, Place]]:
    """Return the source's model in evaluation mode, and where each of its tensors is.

    The model has the dtype that most of the source's bytes have; routers that the file holds in
    float32 stay so where the model can run them.

    Args:
        checkpoint: a local source.
        device: ``cpu``, ``cuda``, ``cuda:1`` …, or ``auto``: all GPUs (one without accelerate),
            else the CPU.

    Raises:
        PlanError: transformers cannot build the model, or keys of it are missing.
        UsageError: no such device.
    """
    size: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in DTYPES:
            size[tensor.dtype] = size.get(tensor.dtype, 0) + tensor.nbytes
    if not size:
        raise PlanError(f"{checkpoint.uri}: holds no floating tensor")
    quantized = is_quantized(checkpoint)
    dtype = torch.bfloat16 if quantized else DTYPES[max(size, key=lambda d: size[d])]
    device_map, target = _placement(device)
    state = decoded_state(checkpoint) if quantized else None
    with _quiet():
        config = _said(checkpoint, lambda: _config(checkpoint, quantized=quantized))
        cls = _class(checkpoint, config)
        model, info = _said(
            checkpoint,
            lambda: cls.from_pretrained(
                None if quantized else checkpoint.uri,
                config=config,
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                device_map=device_map,
            ),
        )
    lost = sorted(str(k) for k in [*info["missing_keys"], *info["mismatched_keys"]])
    if lost:
        raise PlanError(
            f"{checkpoint.uri}: {len(lost)} keys of the model are missing or of another shape, {lost[0]} first"
        )
    if target is not None:
        model.to(target)
    where = places(model.eval(), {c for c in map(canonical, checkpoint.tensors) if c is not None})
    _keep_float32_routers(model, checkpoint, where, dtype)
    return model, where


def _config(checkpoint: Checkpoint, *, quantized: bool) -> Any:
    if not quantized:
        return transformers.AutoConfig.from_pretrained(
            checkpoint.uri, trust_remote_code=False, local_files_only=True
        )
    raw = {
        k: v
        for k, v in (checkpoint.config or {}).items()
        if k not in ("quantization_config", "auto_map")
    }
    return transformers.AutoConfig.for_model(**special_floats(raw))


def tokenizer_of(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """Return the source's own tokenizer, special tokens added as it adds them.

    Raises:
        PlanError: there is none, or it cannot be read.
    """
    if not any(
        n in checkpoint.files
        for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise PlanError(
            f'{checkpoint.uri}: has no tokenizer; give token ids ({{"ids": […]}} in a .jsonl file)'
        )
    with _quiet():
        tokenizer = _said(
            checkpoint,
            lambda: transformers.AutoTokenizer.from_pretrained(
                checkpoint.uri, trust_remote_code=False, local_files_only=True
            ),
        )

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]

    return encode


def _class(checkpoint: Checkpoint, config: Any) -> Any:
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture is None:
        return transformers.AutoModelForCausalLM
    cls = getattr(transformers, architecture, None)
    if cls is None:
        version = transformers.__version__
        raise PlanError(
            f"{checkpoint.uri}: transformers {version} has no architecture {architecture!r} of its own"
        )
    return cls


def _placement(device: str) -> tuple[str | Mapping[str, str] | None, str | None]:
    """Return transformers' device_map, or where to move the whole model."""
    if device == "auto":
        if not torch.cuda.is_available():
            return None, None
        return ("auto", None) if find_spec("accelerate") else (None, "cuda")
    if device == "cpu":
        return None, None
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no such device here")
    return ({"": device}, None) if find_spec("accelerate") else (None, device)


def _said(checkpoint: Checkpoint, call: Callable[[], Any]) -> Any:
    """Run a loader of transformers, and say what it says about the checkpoint's contents."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        if error.errno is not None:  # the disk; transformers' own "no such file" has no number
            raise
        raise _unreadable(checkpoint, error) from error
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        StrictDataclassError,
    ) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Checkpoint, error: Exception) -> PlanError:
    return PlanError(
        f"{checkpoint.uri}: transformers cannot load it: {' '.join(str(error).split())[:300]}"
    )


def _keep_float32_routers(
    model: Any, checkpoint: Checkpoint, where: Mapping[str, Place], dtype: torch.dtype
) -> None:
    """Give routers their float32 values back, which from_pretrained rounded; what an expert sees
    depends on them.
    """
    state = model.state_dict()
    for name, place in where.items():
        tensor, present = checkpoint.tensors.get(name), state.get(place.key)
        module = name.removesuffix(".weight").removesuffix(".bias")
        if (
            tensor is None
            or tensor.dtype != "F32"
            or role(module) != "router"
            or place.converted
            or present is None
        ):
            continue
        if (
            present.dtype == torch.float32
            or present.is_meta
            or tuple(present.shape) != tensor.shape
        ):
            continue
        path, _, leaf = place.key.rpartition(".")
        owner = model.get_submodule(path)
        value = torch.from_numpy(checkpoint.array(tensor).copy()).to(present.device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
            continue
        before = owner._parameters[leaf]
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        if value.ndim == 2 and not _runs(owner, value, dtype):
            owner._parameters[leaf] = before


def _runs(router: Any, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a router takes hidden states of the model's dtype, with its weight in float32."""
    try:
        with torch.inference_mode():
            router(torch.zeros((1, weight.shape[1]), dtype=dtype, device=weight.device))
    except (RuntimeError, TypeError, IndexError):
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports; what they would say is raised or
    judged.
    """
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
