# SPDX-License-Identifier: Apache-2.0
"""``ckptgate config show``."""

from __future__ import annotations

import json
from typing import Any

import click

from verifier.cli.groups import CommandGroup
from verifier.cli.options import SETTINGS
from verifier.cli.outputs import output_options
from verifier.cli.settings import effective_settings
from verifier.rules import all_rules
from verifier.run.select import Selection
from verifier.run.severity import Severities
from verifier.text import printable


@click.group(cls=CommandGroup)
def config() -> None:
    """Show the effective configuration."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@SETTINGS
@output_options
def show(as_json: bool, files: tuple[str, ...], **options: Any) -> None:
    """Print every setting with its origin; takes the options of check."""
    settings, file = effective_settings(options)
    _validate({name: setting.value for name, setting in settings.items()})
    if as_json:
        value = {k: {"value": s.value, "origin": s.origin} for k, s in settings.items()}
        click.echo(json.dumps({"file": str(file) if file else None, "settings": value}, indent=2))
        return
    for key, setting in settings.items():
        unset = setting.value in ([], {}, None)
        value_text = "-" if unset else json.dumps(setting.value, ensure_ascii=False)
        click.echo(f"{key:10}{printable(value_text):30}  {printable(setting.origin, 2000)}")
    click.echo(f"configuration: {printable(str(file), 2000) if file else 'no file'}")


def _validate(values: dict[str, Any]) -> None:
    """Raise `UsageError` if a rule, prefix, profile or severity is not known."""
    Selection(all_rules(), values["select"], values["ignore"], values["require"])
    Severities(all_rules(), values["profile"], values["severity"])
