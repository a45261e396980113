# SPDX-License-Identifier: Apache-2.0
"""Recipes and their schema."""

from exporter.recipes.schema import PROTECTED, KvName, Recipe, RecipeRule, load, names

__all__ = ["PROTECTED", "KvName", "Recipe", "RecipeRule", "load", "names"]
