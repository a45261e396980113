# SPDX-License-Identifier: Apache-2.0
"""``ckptgate help``."""

from __future__ import annotations

import click


@click.command("help")
@click.argument("names", metavar="[COMMAND]...", nargs=-1)
@click.pass_context
def help_(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Show the help of COMMAND, or of ckptgate."""
    context = ctx.find_root()
    command = context.command
    for name in names:
        if not isinstance(command, click.Group):
            raise click.UsageError(f"{context.command_path} has no commands", context)
        _, found, _ = command.resolve_command(context, [name])
        command = found or command  # an unknown name has failed by now
        context = click.Context(command, info_name=name, parent=context)
    click.echo(command.get_help(context))


help = help_  # the name by which commands are found
