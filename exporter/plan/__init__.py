# SPDX-License-Identifier: Apache-2.0
"""Plans: what happens to every tensor. Pure and printable."""

from exporter.plan.build import build, merge, parse_layers
from exporter.plan.model import Action, Constant, Copy, Encode, Plan, Spec, header_digest

__all__ = ["Action", "Constant", "Copy", "Encode", "Plan", "Spec", "build", "header_digest", "merge", "parse_layers"]
