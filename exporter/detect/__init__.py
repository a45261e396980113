# SPDX-License-Identifier: Apache-2.0
"""Find the modules of a transformers model that hold routed experts, and their layout; a module
whose layout is not known exactly is refused by name.
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
