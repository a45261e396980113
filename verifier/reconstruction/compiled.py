# SPDX-License-Identifier: Apache-2.0
"""The compiled loop, where numba is installed (the extra ``fast``) and a check is large enough.

The numpy code is the reference. ``CKPTGATE_FAST=0`` in the environment turns the compiled loop off.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

WORTH_COMPILING = 512 << 20
"""Bytes of a checkpoint to compare with its base from which on numba is worth its import, or the
seconds of compiling where its cache cannot be written."""
_kernels: list[Any] = []


def prepare(nbytes: int) -> None:
    """Load the compiled loop for this process and its copies, if so many bytes are worth it.

    Without numba, or where it fails, the numpy code is used.
    """
    if _kernels or nbytes < WORTH_COMPILING or os.environ.get("CKPTGATE_FAST") == "0":
        return
    try:
        _kernels.append(importlib.import_module("verifier.reconstruction.kernels").compare)
    except Exception:  # noqa: BLE001  (numba fails in many ways, none of which may end a check)
        _kernels.append(None)


def compare() -> Any:
    """Return `verifier.reconstruction.kernels.compare` if it was loaded, else None."""
    return _kernels[0] if _kernels else None
