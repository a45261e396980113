# SPDX-License-Identifier: Apache-2.0
"""Read weights of a checkpoint as torch tensors: as stored, or decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter import codecs
from exporter.layout import Cut, read_region
from exporter.plan import Restack, SourceWeight, Take
from verifier.checkpoint import Checkpoint, Tensor
from verifier.errors import EncodeError
from verifier.layouts.expert_stacks import StoredStack

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}
HELD = 128 << 20
"""Bytes that a thread keeps for the tensors of its next action."""
_NOT_DECODED = ("bias", "input_scale", "input_global_scale", "pre_quant_scale")


class Buffers(threading.local):
    """Memory that a thread reads the tensors of one action into, and then those of the next:
    filling fresh memory takes longer than reading the file.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return uint8 [nbytes], valid until this thread calls `release`."""
        start = self._used
        self._used += -(-nbytes // 64) * 64
        if self._used <= self._memory.size:
            return self._memory[start : start + nbytes]
        return np.empty(nbytes, np.uint8)

    def release(self) -> None:
        """Let the next action overwrite all that was taken."""
        if self._memory.size < min(self._used, HELD):
            self._memory = np.empty(min(self._used, HELD), np.uint8)
        self._used = 0


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Prefix the message of an `EncodeError` with a tensor's name."""
    try:
        yield
    except EncodeError as error:
        raise EncodeError(f"{name}: {error}") from error


def region(ckpt: Checkpoint, take: Take) -> npt.NDArray[Any]:
    """Return what a `Take` takes, contiguous, as unsigned integers of the dtype's width; no more of
    the file is read.

    Raises:
        EncodeError: a dtype with less than one byte per value.
    """
    return read_region(ckpt, take.tensor, take.cuts, take.order)


def load(ckpt: Checkpoint, weight: SourceWeight, buffers: Buffers | None = None) -> torch.Tensor:
    """Return the values of a weight, [out, in]: as stored (in ``buffers``, or in fresh memory), or
    decoded to float32.

    Raises:
        EncodeError: the tensors of a quantized weight do not fit one another.
    """
    parts = load_parts(ckpt, weight, buffers)
    if weight.format is None:
        return parts["weight"]
    with naming(weight.name):
        return codecs.decode(parts, weight.format.name)


def load_parts(
    ckpt: Checkpoint, weight: SourceWeight, buffers: Buffers | None = None
) -> codecs.Parts:
    """Return the tensors of a weight by leaf; FP8 values as their bytes."""
    return {leaf: _tensor(ckpt, t, buffers) for leaf, t in weight.parts.items()}


def load_stack(
    ckpt: Checkpoint, action: Restack, stack: StoredStack, start: int, stop: int
) -> torch.Tensor:
    """Return the values of some experts of a stack, [experts, out, in]: as stored, or decoded to
    float32.

    Raises:
        EncodeError: the tensors of a quantized stack do not fit one another.
    """
    parts = load_stack_parts(ckpt, stack, start, stop)
    if action.read is None:
        return parts["weight"]
    with naming(stack.key):
        return codecs.decode(parts, action.read.name)


def load_stack_parts(ckpt: Checkpoint, stack: StoredStack, start: int, stop: int) -> codecs.Parts:
    """Return the tensors of some experts of a stack by leaf, [experts, out, in]; FP8 values as
    their bytes.
    """
    parts: codecs.Parts = {}
    for leaf, tensor in stack.tensors.items():
        if leaf not in _NOT_DECODED:
            value = _experts(ckpt, tensor, start, stop)
            transposed = stack.transposed and value.ndim == 3
            parts[leaf] = value.transpose(1, 2) if transposed else value
    return parts


def _tensor(ckpt: Checkpoint, tensor: Tensor, buffers: Buffers | None) -> torch.Tensor:
    raw = np.empty(tensor.nbytes, np.uint8) if buffers is None else buffers.take(tensor.nbytes)
    ckpt.source.read_into(tensor.file, tensor.offset, raw)
    return _view(raw, tensor, tensor.shape)


def _experts(ckpt: Checkpoint, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    """Return some experts of a stack's tensor; a scalar as it is."""
    cuts: list[Cut] = []
    shape: tuple[int, ...] = ()
    if tensor.shape and tensor.elements > 1:
        cuts = [Cut(start, 1, stop - start), *(Cut(0, 1, n) for n in tensor.shape[1:])]
        shape = (stop - start, *tensor.shape[1:])
    raw = read_region(ckpt, tensor, cuts, ())
    return _view(raw.reshape(-1).view(np.uint8).copy(), tensor, shape)


def _view(raw: npt.NDArray[np.uint8], tensor: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(_DTYPES.get(tensor.dtype, torch.uint8)).reshape(shape)
