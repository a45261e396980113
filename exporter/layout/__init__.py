# SPDX-License-Identifier: Apache-2.0
"""Names and shapes in memory and on the hub, with every quantized sibling; stacks of experts."""

from exporter.layout.layout import HubPart, Layout, take
from exporter.layout.regions import Cut, read_region
from exporter.layout.siblings import Transfer
from exporter.layout.stacks import (
    EXPERT_LAYOUTS,
    ExpertLayout,
    scale_groups,
    stacks_of,
    unstacked,
)

__all__ = [
    "EXPERT_LAYOUTS",
    "Cut",
    "ExpertLayout",
    "HubPart",
    "Layout",
    "Transfer",
    "read_region",
    "scale_groups",
    "stacks_of",
    "take",
    "unstacked",
]
