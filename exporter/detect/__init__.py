# SPDX-License-Identifier: Apache-2.0
"""Which modules of a transformers model hold routed experts, and in which layout: known exactly, or
refused by name.
"""

from exporter.detect.detect import Detection, detect, detect_config, meta_model
from exporter.detect.layouts import ExpertStack, FusedLinear, Refused
from exporter.detect.registry import READERS, Reader, register

__all__ = [
    "READERS",
    "Detection",
    "ExpertStack",
    "FusedLinear",
    "Reader",
    "Refused",
    "detect",
    "detect_config",
    "meta_model",
    "register",
]
