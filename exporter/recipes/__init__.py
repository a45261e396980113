# SPDX-License-Identifier: Apache-2.0
"""Recipes and their schema."""

from exporter.recipes.schema import Recipe, Rule, load, names

__all__ = ["Recipe", "Rule", "load", "names"]
