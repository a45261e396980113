# SPDX-License-Identifier: Apache-2.0
"""The exporter: make quantized checkpoints, file to file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter import adapters, codecs
    from exporter.calibration import calibrate
    from exporter.exporting import export, export_model, merge, plan_export
    from exporter.repairing import plan_repair, repair

__all__ = [
    "adapters",
    "calibrate",
    "codecs",
    "export",
    "export_model",
    "merge",
    "plan_export",
    "plan_repair",
    "repair",
]
_HOME = {
    "calibrate": "exporter.calibration",
    "export": "exporter.exporting",
    "merge": "exporter.exporting",
    "plan_export": "exporter.exporting",
    "export_model": "exporter.exporting",
    "plan_repair": "exporter.repairing",
    "repair": "exporter.repairing",
}


def __getattr__(name: str) -> Any:
    # torch costs more than a second, and the command line imports this package for its help.
    import importlib  # noqa: PLC0415

    from verifier.errors import MissingExtra  # noqa: PLC0415

    if name not in __all__:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    try:
        if name in ("adapters", "codecs"):
            return importlib.import_module(f"exporter.{name}")
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra("the exporter", "export") from error
