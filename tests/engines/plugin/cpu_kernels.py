# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM: its own emulation of NVFP4 and MXFP8 linear layers is selected on a CPU too."""

from __future__ import annotations

from importlib import import_module

KERNELS = (
    ("_POSSIBLE_NVFP4_KERNELS", "EmulationNvFp4LinearKernel"),
    ("_POSSIBLE_MXFP8_KERNELS", "EmulationMxfp8LinearKernel"),
)


def register() -> None:
    """Register the kernels; vLLM calls it in each of its processes."""
    linear = import_module("vllm.model_executor.kernels.linear")
    platform = import_module("vllm.platforms").current_platform
    for table, name in KERNELS:
        getattr(linear, table).setdefault(platform._enum, [getattr(linear, name)])
