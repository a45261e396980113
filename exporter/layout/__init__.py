# SPDX-License-Identifier: Apache-2.0
"""Names and shapes in transformers' memory to those of the hub and back, with every quantized
sibling.
"""

from exporter.layout.hf_mapping import Place, places
from exporter.layout.layout import Layout, Part, of_model, take
from exporter.layout.regions import read_region
from exporter.layout.siblings import Cut, Transfer
from exporter.layout.stacks import (
    ExpertLayout,
    Stack,
    Stacks,
    Unstacked,
    families,
    read_stacks,
    unstacked,
)

__all__ = [
    "Cut",
    "ExpertLayout",
    "Layout",
    "Part",
    "Place",
    "Stack",
    "Stacks",
    "Transfer",
    "Unstacked",
    "families",
    "of_model",
    "places",
    "read_region",
    "read_stacks",
    "take",
    "unstacked",
]
