# SPDX-License-Identifier: Apache-2.0
"""Index, configs, auxiliary files and manifest, made from the tensors on disk."""

from exporter.emit.configs import PRODUCER, declare, with_quantization
from exporter.emit.files import copy_auxiliary_files, write_configs, write_index, write_json
from exporter.emit.manifest import adaptations, declares_kv_cache, manifest_of, sources_of

__all__ = [
    "PRODUCER",
    "adaptations",
    "copy_auxiliary_files",
    "declare",
    "declares_kv_cache",
    "manifest_of",
    "sources_of",
    "with_quantization",
    "write_configs",
    "write_index",
    "write_json",
]
