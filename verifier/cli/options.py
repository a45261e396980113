# SPDX-License-Identifier: Apache-2.0
"""The options that several commands take, each declared once.

Importing this module costs nothing but click: `ckptgate check --help` imports it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from verifier.summary import FAIL_ON, WEIGHTS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
DEPTHS = ("header", "payload", "load", "engine", "eval")


def together(*decorators: Decorator) -> Decorator:
    """Return one decorator that adds options in the order given."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def depth(*names: str, explanation: str) -> Decorator:
    """Return ``--depth`` with some of `DEPTHS`, the first one by default."""
    return click.option(
        "--depth",
        type=click.Choice(names),
        default=names[0],
        show_default=True,
        help=explanation,
    )


FORMAT = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Output format.",
)
BASE = click.option(
    "--base", metavar="PATH", help="Unquantized or less quantized checkpoint to compare with."
)
MERGED_FROM = click.option(
    "--merged-from",
    metavar="PATH",
    help="Checkpoint whose bytes a mixed export keeps (export --onto).",
)
PLUGIN = click.option(
    "--plugin",
    "plugins",
    metavar="FILE.py",
    multiple=True,
    help="Python file with custom rules; repeatable.",
)
UNITS = click.option(
    "--units",
    metavar="K/N",
    help="Do part K of N of the work, as a job array does; the last part to end completes it.",
)
LOCAL_RAY = "local"
"""The address of ``--ray`` without one."""


def _ray_address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value in (None, LOCAL_RAY) or re.fullmatch(r"[^\s/:]+:[0-9]{1,5}", str(value)):
        return value
    raise click.BadParameter(
        f"{value!r} is not HOST:PORT of a head node; without an address, write --ray last or "
        "before another option"
    )


RAY = click.option(
    "--ray",
    callback=_ray_address,
    metavar="[HOST:PORT]",
    is_flag=False,
    flag_value=LOCAL_RAY,
    help="Divide the work among the nodes of a Ray cluster; without an address, the one that runs "
    "here, else this machine.",
)
RUNNERS = together(UNITS, RAY)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
REPLACED = click.option(
    "--overwrite",
    is_flag=True,
    expose_value=False,
    hidden=True,
    help="Replace an existing output.",
)
"""For commands that replace their output in any case: whoever says so is not refused."""
SELECT = click.option(
    "--select",
    metavar="RULES",
    multiple=True,
    help="Only these rules or prefixes: QC5, QC501,QC3, ALL.",
)
SELECTION = together(
    SELECT,
    click.option(
        "--ignore",
        metavar="RULES",
        multiple=True,
        help="Skip these rules or prefixes; the longer prefix wins.",
    ),
    click.option(
        "--require",
        metavar="RULES",
        multiple=True,
        help="Rules that must run; otherwise the verdict is inconclusive.",
    ),
)
SEVERITY = together(
    click.option(
        "--fail-on",
        type=click.Choice(FAIL_ON),
        help="Lowest severity that fails the check.  [default: error]",
    ),
    click.option(
        "--profile",
        metavar="NAME",
        help="Use one engine's severities (vllm, sglang, trtllm, transformers), the worst of "
        "all (all), or treat warnings as errors (strict).",
    ),
    click.option(
        "--baseline",
        metavar="FILE",
        help="Baseline of accepted findings; only new or worse findings fail.",
    ),
)
CONFIGURATION = together(
    click.option(
        "--config",
        metavar="FILE",
        help="Configuration file.  [default: the nearest ckptgate.toml or pyproject.toml upwards]",
    ),
    click.option("--no-config", is_flag=True, help="Ignore configuration files."),
)
WEIGHTS_OPTION = click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    help="How a method changed the base's weights before it quantized them: base (not at all), "
    "moved (GPTQ, AutoRound, quantization-aware training), rotated (QuaRot, SpinQuant), folded "
    "(AWQ, SmoothQuant).  [default: base]",
)
SETTINGS = together(SELECTION, SEVERITY, WEIGHTS_OPTION, CONFIGURATION)
"""The options with a key in the configuration file, and which file; see `verifier.cli.settings`."""
