# SPDX-License-Identifier: Apache-2.0
"""Names and shapes in transformers' memory to those of the hub and back, with every quantized sibling."""

from exporter.layout.hf_mapping import Place, places
from exporter.layout.layout import Layout, Part, of_model, take
from exporter.layout.siblings import Cut, Transfer

__all__ = ["Cut", "Layout", "Part", "Place", "Transfer", "of_model", "places", "take"]
