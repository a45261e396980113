# SPDX-License-Identifier: Apache-2.0
"""The options of depth engine: which engine loads the checkpoint, under which interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.run.options import EngineOptions

Command = TypeVar("Command", bound=Callable[..., Any])
_OPTIONS = {
    "name": click.option(
        "--engine", type=click.Choice(["vllm"]), help="Engine of depth engine.  [default: vllm]"
    ),
    "python": click.option(
        "--engine-python", metavar="PATH", help="Python interpreter that has the engine."
    ),
    "layers": click.option(
        "--engine-layers",
        metavar="N",
        type=click.IntRange(1, 10_000),
        help="Build the first N layers only.  [default: all, or the fewest that show every kind "
        "of layer if memory is short]",
    ),
    "timeout": click.option(
        "--engine-timeout",
        type=float,
        help="Seconds that the engine may take for each checkpoint.  [default: 1800.0]",
    ),
}


def engine_options(command: Command) -> Command:
    """Add the options; `engine_of` takes their values out of the command's options."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command


def engine_of(depth: str, options: dict[str, Any]) -> EngineOptions | None:
    """Return the engine where the depth is engine, else None.

    Args:
        depth: of the check.
        options: of the command; those of depth engine are taken out.

    Raises:
        UsageError: no interpreter, or an option of depth engine at another depth.
    """
    parameters = {name: "engine" if name == "name" else f"engine_{name}" for name in _OPTIONS}
    values = {name: options.pop(parameter, None) for name, parameter in parameters.items()}
    used = {name: value for name, value in values.items() if value is not None}
    if depth != "engine":
        if used:
            option = parameters[min(used)].replace("_", "-")
            raise UsageError(
                f"--{option} needs --depth engine: no other depth loads with an engine"
            )
        return None
    if "python" not in used:
        raise UsageError(
            "--depth engine needs --engine-python PATH, a Python interpreter that has the engine"
        )
    from verifier.run.options import EngineOptions  # noqa: PLC0415  (numpy; --help needs it not)

    return EngineOptions(**used)
