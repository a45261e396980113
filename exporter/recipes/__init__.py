# SPDX-License-Identifier: Apache-2.0
"""Recipes and their schema."""

from exporter.recipes.schema import PROTECTED, KvName, Recipe, Rule, load, names

__all__ = ["PROTECTED", "KvName", "Recipe", "Rule", "load", "names"]
