# SPDX-License-Identifier: Apache-2.0
"""A group of commands that names the command which a mistyped one probably means."""

from __future__ import annotations

import click

from verifier.suggest import did_you_mean


class CommandGroup(click.Group):
    """A group with suggestions for unknown commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names, and the other arguments."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = did_you_mean(name, self.list_commands(ctx))
            hint = near or f" `{ctx.command_path} --help` lists all commands."
            ctx.fail(f"unknown command {name!r}.{hint}")
        return super().resolve_command(ctx, args)
