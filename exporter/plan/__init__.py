# SPDX-License-Identifier: Apache-2.0
"""Plans: what happens to every tensor. Pure and printable."""

from exporter.plan.build import ExportChoices, build
from exporter.plan.merge import merge
from exporter.plan.model import (
    DEFAULT_ENGINES,
    Action,
    Constant,
    Copy,
    Decode,
    Encode,
    Plan,
    Restack,
    SourceWeight,
    Spec,
    Take,
    header_digest,
)
from exporter.plan.select import parse_layers
from exporter.plan.sources import Reader, Rest
from exporter.plan.stats_file import ActivationStats, read_stats

__all__ = [
    "DEFAULT_ENGINES",
    "Action",
    "ActivationStats",
    "Constant",
    "Copy",
    "Decode",
    "Encode",
    "ExportChoices",
    "Plan",
    "Reader",
    "Rest",
    "Restack",
    "SourceWeight",
    "Spec",
    "Take",
    "build",
    "header_digest",
    "merge",
    "parse_layers",
    "read_stats",
]
