# SPDX-License-Identifier: Apache-2.0
"""Calibration of weights: the choice of block scales."""

from exporter.weights.encode import encode, search
from exporter.weights.exact import exact, top_exponent
from exporter.weights.search import METHODS, Method, global_divisor, sweep_all

__all__ = [
    "METHODS",
    "Method",
    "encode",
    "exact",
    "global_divisor",
    "search",
    "sweep_all",
    "top_exponent",
]
