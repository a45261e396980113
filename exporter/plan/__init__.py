# SPDX-License-Identifier: Apache-2.0
"""Plans: what happens to every tensor. Pure and printable."""

from exporter.plan.build import build
from exporter.plan.merge import merge
from exporter.plan.model import (
    Action,
    Constant,
    Copy,
    Decode,
    Encode,
    Plan,
    Restack,
    Spec,
    Stats,
    Take,
    Weight,
    header_digest,
)
from exporter.plan.select import parse_layers
from exporter.plan.sources import Reader, Rest

__all__ = [
    "Action",
    "Constant",
    "Copy",
    "Decode",
    "Encode",
    "Plan",
    "Reader",
    "Rest",
    "Restack",
    "Spec",
    "Stats",
    "Take",
    "Weight",
    "build",
    "header_digest",
    "merge",
    "parse_layers",
]
