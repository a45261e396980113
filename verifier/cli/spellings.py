# SPDX-License-Identifier: Apache-2.0
"""Commands that accept the former spellings of their options for one release, with a warning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from verifier.cli.terminal import note

GONE_IN = "0.3.0"


class RenamedOptions(click.Command):
    """A command with former spellings: ``{"--force": ("--overwrite",)}``.

    A flag may become an option with a value: ``{"--payload": ("--depth", "payload")}``.
    """

    def __init__(
        self, *args: Any, renamed: Mapping[str, tuple[str, ...]] | None = None, **attributes: Any
    ) -> None:
        super().__init__(*args, **attributes)
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Replace former spellings, then parse."""
        return super().parse_args(ctx, list(self._current(args)))

    def _current(self, args: list[str]) -> Iterator[str]:
        for number, text in enumerate(args):
            if text == "--":
                yield from args[number:]
                return
            name, equals, value = text.partition("=")
            if name not in self.renamed:
                yield text
                continue
            option, *fixed = self.renamed[name]
            note(
                f"ckptgate: {name} is now {' '.join([option, *fixed])}; "
                f"{GONE_IN} will not know the old spelling"
            )
            yield f"{option}{equals}{value}"
            yield from fixed
