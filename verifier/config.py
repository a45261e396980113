# SPDX-License-Identifier: Apache-2.0
"""``[tool.ckptgate]`` in pyproject.toml, or ckptgate.toml: how a project checks its checkpoints.

The nearest file from the working directory upwards is read; ckptgate.toml wins over pyproject.toml
in the same directory. A command-line option replaces the file's value of the same key. Paths in the
file (``baseline``, and files in ``formats``) are relative to its directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from verifier.errors import UsageError
from verifier.findings import Severity
from verifier.report import FORMATS
from verifier.rules import all_rules
from verifier.run.select import nearest, prefixes
from verifier.run.severity import PROFILES, Severities
from verifier.summary import WEIGHTS, FailOn

NAME, PYPROJECT = "ckptgate.toml", "pyproject.toml"
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of a configuration file, with their defaults."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    select: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    require: list[str] = field(default_factory=list)
    fail_on: FailOn = "error"
    profile: str | None = None
    severity: dict[str, Severity | dict[str, Severity]] = field(default_factory=dict)
    baseline: str | None = None
    weights: str | None = None
    formats: list[str] = field(default_factory=lambda: ["text"])


KEYS = tuple(f.name for f in fields(Config))


@dataclass(frozen=True, slots=True)
class Setting:
    """An effective value and where it comes from: ``command line``, a file, or ``default``."""

    value: Any
    origin: str


def find(start: Path) -> Path | None:
    """Return the nearest configuration file from a directory upwards, or None.

    Raises:
        UsageError: a pyproject.toml on the way is not valid TOML.
    """
    for folder in (start, *start.parents):
        if (folder / NAME).is_file():
            return folder / NAME
        project = folder / PYPROJECT
        if project.is_file() and _table(project) is not None:
            return project
    return None


def load(file: Path) -> Config:
    """Read and validate a configuration file.

    Raises:
        UsageError: it cannot be read; an unknown key, rule, profile, severity or format. The
            message names file and key.
    """
    return _validated(file, _stated(file))


def _stated(file: Path) -> dict[str, Any]:
    """Return the keys that a file states, with their values as they are there."""
    table = _table(file)
    if table is None:
        raise UsageError(f"{file} has no table [tool.ckptgate]")
    for key in table:
        if key not in KEYS:
            at = "tool.ckptgate." if file.name == PYPROJECT else ""
            hint = nearest(key, KEYS)
            if key == "tool":
                hint = "keys are at the top level of ckptgate.toml, without [tool.ckptgate]; "
            raise UsageError(f"{file}: unknown key {at + key!r}; {hint}the keys are {_list(KEYS)}")
    return table


def _validated(file: Path, table: dict[str, Any]) -> Config:
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (only to read a file)

    try:
        config = TypeAdapter(Config).validate_python(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        keys = [
            key
            for key in map(str, first["loc"])
            if key in table or not key.startswith(("literal[", "dict["))
        ]
        raise UsageError(f"{file}: {'.'.join(keys)}: {first['msg']}") from error
    try:
        _check_values(config)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return config


def effective(options: Mapping[str, Any], file: Path | None) -> dict[str, Setting]:
    """Return every setting with its origin: the command line, else the file, else the default.

    Args:
        options: values of the command line by key; None and () mean that the option is not used.
        file: the configuration file, or None.
    """
    stated = _stated(file) if file is not None else {}
    config = _validated(file, stated) if file is not None else Config()
    settings = {}
    for key in KEYS:
        if options.get(key) not in (None, ()):
            settings[key] = Setting(options[key], "command line")
        elif file is not None and key in stated:
            settings[key] = Setting(_resolved(key, getattr(config, key), file.parent), str(file))
        else:
            settings[key] = Setting(getattr(config, key), "default")
    return settings


def _check_values(config: Config) -> None:
    rules = all_rules()
    for key in ("select", "ignore", "require"):
        prefixes(getattr(config, key), rules, key)
    if config.profile is not None and config.profile not in PROFILES:
        near = nearest(config.profile, PROFILES)
        raise UsageError(
            f"profile: unknown profile {config.profile!r}; {near}one of {_list(PROFILES)}"
        )
    if config.weights is not None and config.weights not in WEIGHTS:
        near = nearest(config.weights, WEIGHTS)
        raise UsageError(f"weights: {config.weights!r}; {near}one of {_list(WEIGHTS)}")
    Severities(rules, None, config.severity)
    for text in config.formats:
        name = text.partition("=")[0]
        if name not in FORMATS:
            near = nearest(name, FORMATS)
            raise UsageError(f"formats: unknown format {name!r}; {near}one of {_list(FORMATS)}")


def _resolved(key: str, value: Any, folder: Path) -> Any:
    if key == "baseline" and value is not None:
        return str(folder / value)
    if key == "formats":
        parts = [text.partition("=") for text in value]
        return [
            f"{name}={folder / path}" if path and path != "-" else name for name, _, path in parts
        ]
    return value


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _table(file: Path) -> dict[str, Any] | None:
    """Return ckptgate's table of a file; None for a pyproject.toml without one."""
    try:
        with file.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"{file}: larger than {MAX_BYTES:,} bytes")
        value = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file}: invalid TOML: {error} (--no-config ignores it)") from error
    if file.name != PYPROJECT:
        return value
    tool = value.get("tool")
    table = tool.get("ckptgate") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{file}: tool.ckptgate is not a table")
    return table
