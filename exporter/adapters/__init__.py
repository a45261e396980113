# SPDX-License-Identifier: Apache-2.0
"""State-dict adapters for training frameworks: hub layout to native layout and back; MXFP8 is
decoded on load.
"""

from __future__ import annotations

import warnings
from typing import Any

from exporter.adapters.adapter import StateDictAdapter
from exporter.adapters.shards import create_mxfp8_scale_inv, dequantize_mxfp8
from exporter.adapters.tables import (
    MINIMAX_M3,
    MINIMAX_M3_TEXT,
    QWEN3_MOE,
    TABLES,
    Mtp,
    NativePrefix,
    NativeStack,
    Table,
)

__all__ = [
    "MINIMAX_M3",
    "MINIMAX_M3_TEXT",
    "QWEN3_MOE",
    "TABLES",
    "Mtp",
    "NativePrefix",
    "NativeStack",
    "StateDictAdapter",
    "Table",
    "create_mxfp8_scale_inv",
    "dequantize_mxfp8",
]

_RENAMED = {"Place": NativePrefix, "Stack": NativeStack}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"exporter.adapters.{name} is renamed to {new.__name__}", DeprecationWarning, stacklevel=2
    )
    return new
