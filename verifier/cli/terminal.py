# SPDX-License-Identifier: Apache-2.0
"""The options that every command has: ``--color``, ``--progress``, ``-q`` and ``-v``, before or
after the command's name.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import IO, Any, Literal

import click

ProgressMode = Literal["auto", "bar", "plain", "json", "none"]
_KEY = "ckptgate.terminal"


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a command writes to the terminal.

    Attributes:
        color: ``auto``, ``always`` or ``never``.
        progress: how progress is shown.
        quiet: print results only, without progress and notes.
        verbose: print details that are otherwise summed up.
    """

    color: str = "auto"
    progress: ProgressMode = "auto"
    quiet: bool = False
    verbose: bool = False

    def color_of(self, stream: IO[Any]) -> bool:
        """Whether a stream gets colors: as --color says, else as NO_COLOR and FORCE_COLOR say, else
        where it is a terminal.
        """
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR") not in (None, "", "0"):
            return True
        return stream.isatty() and os.environ.get("TERM") != "dumb"

    def progress_mode(self) -> ProgressMode:
        """Return how progress is shown; ``auto`` is a bar on a terminal, plain lines elsewhere."""
        if self.progress != "auto":
            return self.progress
        if self.quiet:
            return "none"
        dumb = os.environ.get("TERM") == "dumb"
        return "bar" if sys.stderr.isatty() and not dumb else "plain"


def terminal() -> Terminal:
    """Return the options of the running command."""
    ctx = click.get_current_context(silent=True)
    settings: Terminal = ctx.meta.get(_KEY, Terminal()) if ctx is not None else Terminal()
    return settings


def note(message: str) -> None:
    """Print a remark on stderr, unless the user asked for quiet."""
    if not terminal().quiet:
        click.echo(message, err=True)


_kept = ""


def on_interrupt(kept: str) -> None:
    """Set what an interrupt of the running command prints: what is kept, and how to resume."""
    global _kept
    _kept = kept


def ended(how: str) -> str:
    """Return the message of a command that a signal ended: ``interrupted`` or ``terminated``."""
    return f"{how}; {_kept}" if _kept else how


def _set(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value not in (None, False):
        settings: Terminal = ctx.meta.get(_KEY, Terminal())
        ctx.meta[_KEY] = replace(settings, **{str(param.name): value})


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, expose_value=False, callback=_set, **attributes)


TERMINAL_OPTIONS = (
    _option(
        "--color",
        metavar="WHEN",
        type=click.Choice(["auto", "always", "never"]),
        help="auto, always or never.",
    ),
    _option(
        "--progress",
        metavar="HOW",
        type=click.Choice(["auto", "bar", "plain", "json", "none"]),
        help="auto, bar, plain, json or none.",
    ),
    _option("-q", "--quiet", is_flag=True, help="Print results only."),
    _option("-v", "--verbose", is_flag=True, help="Print more details."),
)


def add_terminal_options(command: click.Command) -> None:
    """Add the options to a command and its subcommands, once."""
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            add_terminal_options(sub)
    names = {name for param in command.params for name in param.opts}
    command.params += [o for o in TERMINAL_OPTIONS if not names & set(o.opts)]
