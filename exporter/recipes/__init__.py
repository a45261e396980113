# SPDX-License-Identifier: Apache-2.0
"""Recipes and their schema."""

from exporter.recipes.schema import KvName, Recipe, Rule, load, names

__all__ = ["KvName", "Recipe", "Rule", "load", "names"]
