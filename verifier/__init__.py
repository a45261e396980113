# SPDX-License-Identifier: Apache-2.0
"""The verifier: check quantized checkpoints. It never imports the exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verifier import gate
    from verifier.checkpoint import Checkpoint, open_checkpoint
    from verifier.decoding import decode
    from verifier.errors import CkptgateError
    from verifier.findings import Coverage, Finding, Report, Where
    from verifier.inspect.diff import diff
    from verifier.run import check

__version__ = "0.1.0"
_HOME = {
    "Checkpoint": "verifier.checkpoint",
    "CkptgateError": "verifier.errors",
    "Coverage": "verifier.findings",
    "Finding": "verifier.findings",
    "Report": "verifier.findings",
    "Where": "verifier.findings",
    "check": "verifier.run",
    "decode": "verifier.decoding",
    "diff": "verifier.inspect.diff",
    "open_checkpoint": "verifier.checkpoint",
}
__all__ = [
    "Checkpoint",
    "CkptgateError",
    "Coverage",
    "Finding",
    "Report",
    "Where",
    "check",
    "decode",
    "diff",
    "gate",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    # Names are imported on first use: `ckptgate --help` must not import numpy.
    import importlib  # noqa: PLC0415

    if name == "gate":
        return importlib.import_module("verifier.gate")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'verifier' has no attribute {name!r}")
