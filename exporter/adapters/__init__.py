# SPDX-License-Identifier: Apache-2.0
"""State-dict adapters for training frameworks: hub layout to native layout and back, MXFP8 decoded
on load.
"""

from __future__ import annotations

from exporter.adapters.adapter import StateDictAdapter
from exporter.adapters.shards import create_mxfp8_scale_inv, dequantize_mxfp8
from exporter.adapters.tables import (
    MINIMAX_M3,
    MINIMAX_M3_TEXT,
    QWEN3_MOE,
    TABLES,
    Mtp,
    Place,
    Stack,
    Table,
)

__all__ = [
    "MINIMAX_M3",
    "MINIMAX_M3_TEXT",
    "QWEN3_MOE",
    "TABLES",
    "Mtp",
    "Place",
    "Stack",
    "StateDictAdapter",
    "Table",
    "create_mxfp8_scale_inv",
    "dequantize_mxfp8",
]
