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

from exporter.calibration.decoded import decoded_state
from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, EncodeError, PlanError, UsageError
from verifier.load import hf
from verifier.schemes import FLOATS, canonical, gather, role


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a source is quantized; transformers decodes few formats, so it is then given decoded
    values.
    """
    return any(m.quantized for m in gather(checkpoint.tensors.values()).values())


def load_source(checkpoint: Checkpoint, device: str) -> tuple[Any, dict[str, hf.ParameterKey]]:
    """Return the source's model in evaluation mode, and which parameter each of its tensors is.

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
    quantized = is_quantized(checkpoint)
    dtype = torch.bfloat16 if quantized else _main_dtype(checkpoint)
    device_map, target = _placement(device)
    state = decoded_state(checkpoint) if quantized else None
    with _as_plan_errors(checkpoint), hf.quiet():
        cls, config = _class(checkpoint)
        model, info = cls.from_pretrained(
            None if quantized else checkpoint.uri,
            config=config,
            state_dict=state,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=device_map,
        )
        hf.require_complete(checkpoint.uri, info)
    if target is not None:
        model.to(target)
    keys = hf.parameter_keys(model.eval(), {n for n in map(canonical, checkpoint.tensors) if n})
    if dtype != torch.float32:
        routers = {n: k for n, k in keys.items() if _is_router(n) and n in checkpoint.tensors}
        hf.restore_float32(model, checkpoint, routers, dtype)
    return model, keys


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating dtype that most of a checkpoint's bytes have.

    Raises:
        PlanError: it holds no floating tensor.
    """
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        raise PlanError(f"{checkpoint.uri}: holds no floating-point tensor")
    return hf.DTYPES[max(sizes, key=lambda d: sizes[d])]


def _is_router(name: str) -> bool:
    return role(name.removesuffix(".weight").removesuffix(".bias")) == "router"


def _class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    config = hf.read_config(checkpoint.uri, checkpoint.config or {})
    if hf.architecture_of(config) is None:
        return transformers.AutoModelForCausalLM, config
    return hf.class_of(checkpoint.uri, config), config


def tokenizer_of(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """Return the source's own tokenizer, special tokens added as it adds them.

    Raises:
        PlanError: there is none, or it cannot be read.
    """
    with _as_plan_errors(checkpoint):
        tokenizer = hf.load_tokenizer(checkpoint)
    if tokenizer is None:
        raise PlanError(
            f"{checkpoint.uri}: has no tokenizer; give token ids "
            '({"ids": […]} per line of a .jsonl file)'
        )

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]

    return encode


def _placement(device: str) -> tuple[str | Mapping[str, str] | None, str | None]:
    """Return transformers' device_map, or where to move the whole model.

    Raises:
        UsageError: no such device.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return None, None
        return ("auto", None) if find_spec("accelerate") else (None, "cuda")
    if device == "cpu":
        return None, None
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine has no such device")
    return ({"": device}, None) if find_spec("accelerate") else (None, device)


@contextmanager
def _as_plan_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise what transformers raises about the checkpoint's contents as `PlanError`."""
    try:
        yield
    except (torch.OutOfMemoryError, EncodeError, PlanError):
        raise
    except ContentError as error:
        raise PlanError(str(error)) from error
    except (OSError, *hf.BUILD_ERRORS) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk; transformers' own "no such file" has no number
        raise PlanError(
            f"{checkpoint.uri}: transformers cannot load it: {hf.one_line(error)}"
        ) from error
