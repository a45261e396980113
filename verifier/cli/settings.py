# SPDX-License-Identifier: Apache-2.0
"""The options that say how to judge, shared by the commands that check; each has its key in a
configuration file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.config import Setting

_OPTIONS = (
    click.option(
        "--select",
        metavar="RULES",
        multiple=True,
        help="Rules or prefixes to run: QC5, QC501,QC3, ALL.",
    ),
    click.option(
        "--ignore",
        metavar="RULES",
        multiple=True,
        help="Rules or prefixes not to run; a longer prefix wins.",
    ),
    click.option(
        "--require",
        metavar="RULES",
        multiple=True,
        help="Rules that must run, else the verdict is inconclusive.",
    ),
    click.option(
        "--fail-on",
        type=click.Choice(["error", "warning"]),
        help="The least that fails. [default: error]",
    ),
    click.option(
        "--profile",
        metavar="NAME",
        help="Severities as an engine's: vllm, sglang, trtllm, transformers; the worst: all; strict: warnings are errors.",
    ),
    click.option(
        "--baseline", metavar="FILE", help="Accepted findings; what is new or worse fails."
    ),
    click.option(
        "--config",
        metavar="FILE",
        help="ckptgate.toml or pyproject.toml, instead of the nearest one upwards.",
    ),
    click.option("--no-config", is_flag=True, help="Read no configuration file."),
)


def judging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; their values go to `settings`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings(given: dict[str, Any]) -> tuple[dict[str, Setting], Path | None]:
    """Return every effective setting with its origin, and the configuration file that was read, if
    any.

    Raises:
        UsageError: a configuration file is absent or wrong, or --config and --no-config both stand.
    """
    from verifier.config import effective, find  # noqa: PLC0415  (pydantic and numpy; --help needs neither)

    wanted, none = given.get("config"), given.get("no_config")
    if wanted and none:
        raise UsageError("--config and --no-config contradict each other")
    try:
        file = None if none else (Path(wanted) if wanted else find(Path.cwd()))
    except (
        OSError
    ) as error:  # a working directory that was removed, a folder above it that must not be read
        where = f" {error.filename}" if error.filename else ""
        raise UsageError(
            f"looking for a configuration:{where} {error.strerror}; --no-config judges without one"
        ) from error
    return effective(given, file), file


def judging(found: dict[str, Setting]) -> dict[str, Any]:
    """Return the arguments of `verifier.check` that the settings stand for."""
    return {k: s.value for k, s in found.items() if k != "formats"}
