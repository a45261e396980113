# SPDX-License-Identifier: Apache-2.0
"""Options of the command line: each has a help text, and one that several commands share is
declared once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from verifier.cli import cli

SHARED = (
    "--select",
    "--ignore",
    "--require",
    "--fail-on",
    "--profile",
    "--baseline",
    "--config",
    "--no-config",
    "--merged-from",
    "--documents",
    "--overwrite",
)
"""Options with one meaning wherever they occur."""


def options(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Option]]:
    """Yield (command, option) of a command and all below it."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from options(child, click.Context(child, parent=context, info_name=name))
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield context.command_path, parameter


ALL = list(options(cli, click.Context(cli, info_name="ckptgate")))


def test_shared_options_have_one_help_text() -> None:
    texts: dict[str, set[str | None]] = {}
    for command, option in ALL:
        if command != "ckptgate calibrate":
            texts.setdefault(option.opts[0], set()).add(option.help)
    assert {name: len(texts[name]) for name in SHARED} == dict.fromkeys(SHARED, 1)


def test_every_option_has_a_help_text_that_is_a_sentence() -> None:
    without = {f"{command} {o.opts[0]}" for command, o in ALL if not o.help and not o.hidden}
    assert without == set()
    for command, option in ALL:
        text = re.sub(r"\s*\[(default|required).*\]$", "", option.help or "")
        assert not text or text.endswith((".", ")", "…")), f"{command} {option.opts[0]}: {text}"


def test_settings_are_the_keys_of_the_configuration_file() -> None:
    from verifier.config import KEYS

    names = {option.name for command, option in ALL if command == "ckptgate check"}
    assert set(KEYS) - {"severity"} <= names
