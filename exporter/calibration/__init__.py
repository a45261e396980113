# SPDX-License-Identifier: Apache-2.0
"""Activation calibration: run texts through the unquantized model and record each module's largest
input, by hub name.
"""

from exporter.calibration.extra import VERSIONS as VERSIONS  # before modules that import torch
from exporter.calibration.report import (
    CalibrationReport,
    Fallback,
    LayerExperts,
    TextUse,
    render_text,
)
from exporter.calibration.run import calibrate

__all__ = ["CalibrationReport", "Fallback", "LayerExperts", "TextUse", "calibrate", "render_text"]
