# SPDX-License-Identifier: Apache-2.0
"""Recipes: which modules get which format, as checked YAML. The last rule that matches a module
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
"""Roles that no wildcard reaches: a rule names them by role, or by a pattern that itself reads as
that role."""
MAX_RECIPE_BYTES = 1_000_000


class Rule(BaseModel):
    """One rule: modules by role, by name pattern (fnmatch on the full hub name), or both;
    ``format`` None leaves them.

    Every role that it lists must be in the model, unless ``match`` is ``any``: then one of them is
    enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    roles: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    match: Literal["all", "any"] = "all"
    format: FormatName | None

    @model_validator(mode="after")
    def _selects(self) -> Rule:
        if not self.roles and not self.modules:
            raise ValueError("a rule names roles, modules or both")
        unknown = [r for r in self.roles if r not in ROLES]
        if unknown:
            near = difflib.get_close_matches(unknown[0], ROLES, n=1)
            hint = f"{near[0]!r} is one" if near else f"one of {', '.join(ROLES)}"
            raise ValueError(f"no role {unknown[0]!r}; {hint}")
        return self

    def matches(self, module: str) -> bool:
        """Whether the rule speaks of a module."""
        if not self.modules:
            return role(module) in self.roles
        return any(self.reaches(module, p) for p in self.modules)

    def reaches(self, module: str, pattern: str) -> bool:
        """Whether one of the rule's patterns finds a module."""
        what = role(module)
        if self.roles and what not in self.roles:
            return False
        if not fnmatch.fnmatchcase(module, pattern):
            return False
        return (
            self.format is None
            or what not in PROTECTED
            or what in self.roles
            or role(pattern) == what
        )

    def __str__(self) -> str:
        return ", ".join([*self.roles, *self.modules])


class Recipe(BaseModel):
    """A named list of rules, and how weight scales are chosen (``calibration``; see
    `exporter.weights`).

    ``kv_cache``: ``fp8`` declares an FP8 KV cache with a scale for each layer, from calibration;
    ``fp8_cast`` declares one without scales (engines use 1.0).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    calibration: CalibrationName = "max"
    kv_cache: KvName | None = None
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    def deciding(self, module: str) -> Rule | None:
        """Return the last rule that speaks of a module."""
        return next((r for r in reversed(self.rules) if r.matches(module)), None)

    def format_of(self, module: str) -> FormatName | None:
        """Return the format that the recipe gives a module, or None to leave it."""
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
        UsageError: no such recipe or file, no YAML, or a key or value that the schema does not
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
        nearest = f" (nearest: {near[0]})" if near else ""
        raise UsageError(
            f"no recipe {text!r}; one of {', '.join(names())}, or a .yaml file{nearest}"
        )
    try:
        return Recipe.model_validate(yaml.safe_load(source))
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {text}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise UsageError(f"recipe {text}: {place or 'top level'}: {first['msg']}") from error
    except RecursionError as error:
        raise UsageError(f"recipe {text}: not YAML: nested too deeply") from error
    except (
        ValueError
    ) as error:  # PyYAML lets the constructors' own errors through: an impossible date
        raise UsageError(f"recipe {text}: not YAML: {' '.join(str(error).split())}") from error
