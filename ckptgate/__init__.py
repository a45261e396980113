# SPDX-License-Identifier: Apache-2.0
"""Validate quantized LLM checkpoints before you ship them, and make them.

This package is the public face of two others: `verifier` checks checkpoints, `exporter` makes them.
Every public name of both is here: ``ckptgate.check``, ``ckptgate.export``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckptgate.shadowing import shadowing_package

if TYPE_CHECKING:
    from exporter import (
        adapters,
        calibrate,
        codecs,
        export,
        export_model,
        merge,
        plan_export,
        plan_repair,
        repair,
    )
    from verifier import (
        Checkpoint,
        CkptgateError,
        Coverage,
        Finding,
        Report,
        Where,
        __version__,
        check,
        decode,
        diff,
        gate,
        open_checkpoint,
    )

__all__ = [
    "Checkpoint",
    "CkptgateError",
    "Coverage",
    "Finding",
    "Report",
    "Where",
    "__version__",
    "adapters",
    "calibrate",
    "check",
    "codecs",
    "decode",
    "diff",
    "export",
    "export_model",
    "gate",
    "merge",
    "open_checkpoint",
    "plan_export",
    "plan_repair",
    "repair",
]
_MAKING = {
    "adapters",
    "calibrate",
    "codecs",
    "export",
    "export_model",
    "merge",
    "plan_export",
    "plan_repair",
    "repair",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use: numpy and torch cost up to seconds.
    if name not in __all__:
        raise AttributeError(f"module 'ckptgate' has no attribute {name!r}")
    problem = shadowing_package()
    if problem:
        raise ImportError(problem)
    return getattr(importlib.import_module("exporter" if name in _MAKING else "verifier"), name)
