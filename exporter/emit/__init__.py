# SPDX-License-Identifier: Apache-2.0
"""Configs, index, side files: emitted from the tensors on disk."""

from exporter.emit.configs import PRODUCER, declare, with_quantization
from exporter.emit.files import copy_side_files, write_configs, write_index, write_json

__all__ = [
    "PRODUCER",
    "copy_side_files",
    "declare",
    "with_quantization",
    "write_configs",
    "write_index",
    "write_json",
]
