# SPDX-License-Identifier: Apache-2.0
"""Recipes: which modules get which format, as validated YAML. The last rule that matches a module
decides.
"""

from __future__ import annotations

import difflib
import fnmatch
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from verifier.errors import UsageError
from verifier.schemes import ROLES, role

FormatName = Literal["nvfp4", "w4a16_nvfp4", "mxfp8", "fp8", "fp8_per_channel", "fp8_block"]
CalibrationName = Literal["max", "mse", "sweep", "four_over_six"]
KvName = Literal["fp8", "fp8_cast"]
PROTECTED = frozenset(
    {"router", "norm", "embedding", "lm_head", "vision", "projector", "indexer", "mtp"}
)
"""Roles that wildcards never match: a rule selects them by role, or by a pattern that itself has
that role."""
MAX_RECIPE_BYTES = 1_000_000


class RecipeRule(BaseModel):
    """One rule: modules by role, by name pattern (fnmatch on the full hub name), or both;
    ``format`` None does not quantize them.

    The model must have every role that it lists, or, with ``match: any``, one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    roles: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    match: Literal["all", "any"] = "all"
    format: FormatName | None

    @model_validator(mode="after")
    def _selects(self) -> RecipeRule:
        if not self.roles and not self.modules:
            raise ValueError("a rule needs roles, modules or both")
        unknown = [r for r in self.roles if r not in ROLES]
        if unknown:
            near = difflib.get_close_matches(unknown[0], ROLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(ROLES)}"
            raise ValueError(f'unknown role "{unknown[0]}": {hint}')
        return self

    def matches(self, module: str) -> bool:
        """Whether the rule applies to a module."""
        if not self.modules:
            return role(module) in self.roles
        return any(self.reaches(module, p) for p in self.modules)

    def reaches(self, module: str, pattern: str) -> bool:
        """Whether a pattern of the rule matches a module."""
        module_role = role(module)
        if self.roles and module_role not in self.roles:
            return False
        if not fnmatch.fnmatchcase(module, pattern):
            return False
        if self.format is None or module_role not in PROTECTED:
            return True
        return module_role in self.roles or role(pattern) == module_role

    def __str__(self) -> str:
        return ", ".join([*self.roles, *self.modules])


class Recipe(BaseModel):
    """A named list of rules, and the search for weight scales (``calibration``; see
    `exporter.weights`).

    ``kv_cache``: ``fp8`` declares an FP8 KV cache with one scale per layer, from calibration;
    ``fp8_cast`` declares one without scales (engines use 1.0).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    calibration: CalibrationName = "max"
    kv_cache: KvName | None = None
    rules: Annotated[tuple[RecipeRule, ...], Field(min_length=1)]

    def deciding(self, module: str) -> RecipeRule | None:
        """Return the last rule that applies to a module."""
        return next((r for r in reversed(self.rules) if r.matches(module)), None)

    def format_of(self, module: str) -> FormatName | None:
        """Return the format that the recipe gives a module, None where it does not quantize it."""
        rule = self.deciding(module)
        return rule.format if rule is not None else None


def names() -> list[str]:
    """Return the names of the recipes in the package."""
    folder = resources.files("exporter.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load(name: str | Path) -> Recipe:
    """Return a recipe of the package by name, or one from a YAML file.

    Raises:
        UsageError: no such recipe or file, invalid YAML, or a key or value that the schema does not
            have.
    """
    text = str(name)
    if text in names():
        source = (resources.files("exporter.recipes") / f"{text}.yaml").read_text(encoding="utf-8")
    elif text.endswith((".yaml", ".yml")) and Path(text).is_file():
        if Path(text).stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"recipe {text}: larger than {MAX_RECIPE_BYTES:,} bytes")
        source = Path(text).read_text(encoding="utf-8", errors="replace")
    else:
        near = difflib.get_close_matches(text, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f'unknown recipe "{text}".{hint} Use a .yaml file, or one of {", ".join(names())}'
        )
    try:
        return Recipe.model_validate(yaml.safe_load(source))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"recipe {text}: {path or 'top level'}: {message}") from error
    except RecursionError as error:
        raise UsageError(f"recipe {text}: invalid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML does not wrap the errors of its constructors: an impossible date is a ValueError.
        raise UsageError(f"recipe {text}: invalid YAML: {' '.join(str(error).split())}") from error
