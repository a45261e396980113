# SPDX-License-Identifier: Apache-2.0
"""The effective settings of a check: command line before configuration file before default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.config import Setting


def effective_settings(options: Mapping[str, Any]) -> tuple[dict[str, Setting], Path | None]:
    """Return every effective setting with its origin, and the configuration file, if any.

    Args:
        options: the values of `verifier.cli.options.SETTINGS`, by parameter name.

    Raises:
        UsageError: a configuration file is missing or invalid, or --config is used with
            --no-config.
    """
    from verifier.config import effective, find  # noqa: PLC0415  (numpy, which --help does not need)

    file, without = options.get("config"), options.get("no_config")
    if file and without:
        raise UsageError("use --config or --no-config, not both")
    if without:
        return effective(options, None), None
    try:
        path = Path(file) if file else find(Path.cwd())
    except OSError as error:  # the working directory was removed, or a directory is not readable
        where = f"{error.filename}: " if error.filename else ""
        raise UsageError(
            f"cannot look for a configuration file: {where}{error.strerror}; use --no-config"
        ) from error
    return effective(options, path), path


def check_arguments(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the settings as keyword arguments of `verifier.check`."""
    return {name: setting.value for name, setting in settings.items() if name != "formats"}
