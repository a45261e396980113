# SPDX-License-Identifier: Apache-2.0
"""The compiled back end: used for CPU tensors if numba is installed (the extra ``fast``), with the
same bytes.

The torch code is the reference, and runs on all other devices. ``CKPTGATE_FAST=0`` in the
environment, or `use`, turns the compiled back end off.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from typing import Any, Literal

import torch

from verifier.errors import EncodeError

Backend = Literal["torch", "numba"]
VARIABLE = "CKPTGATE_FAST"
_INFINITY = 0x7F800000
_chosen: list[Backend | None] = [None]


@lru_cache(maxsize=1)
def _kernels() -> Any:
    try:
        return importlib.import_module("exporter.codecs.kernels")
    except (ImportError, OSError):  # not installed, or no memory for it
        return None


def use(backend: Backend | None) -> None:
    """Choose the back end of this process; None restores the default.

    Raises:
        EncodeError: numba was chosen and cannot be imported.
    """
    if backend == "numba" and _kernels() is None:
        raise EncodeError("cannot import numba; run pip install 'ckptgate[fast]'")
    _chosen[0] = backend


def backend() -> Backend:
    """Return the back end that encodes and decodes CPU tensors."""
    if _chosen[0] is not None:
        return _chosen[0]
    return "torch" if os.environ.get(VARIABLE) == "0" or _kernels() is None else "numba"


def kernels(device: torch.device) -> Any:
    """Return `exporter.codecs.kernels` if it is to be used for tensors of a device, else None."""
    return _kernels() if device.type == "cpu" and backend() == "numba" else None


def array(tensor: torch.Tensor) -> Any:
    """Return a contiguous CPU tensor as an array on the same memory; one-byte dtypes as uint8."""
    return (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).detach().numpy()


def finite(bits: int) -> bool:
    """Return whether the bits of a magnitude are those of a finite float32."""
    return bits < _INFINITY
