# SPDX-License-Identifier: Apache-2.0
"""``ckptgate config show``."""

from __future__ import annotations

import json
from typing import Any

import click

from verifier.cli.outputs import output_options
from verifier.cli.settings import judging_options, settings


@click.group()
def config() -> None:
    """Show how checks are configured here."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@judging_options
@output_options
def show(as_json: bool, files: tuple[str, ...], **given: Any) -> None:
    """Print the value of every key and where it comes from; takes the options of check."""
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy, see check)
    from verifier.run.select import Selection  # noqa: PLC0415
    from verifier.run.severity import Severities  # noqa: PLC0415

    found, file = settings(given)
    Selection(all_rules(), *(found[k].value for k in ("select", "ignore", "require")))
    Severities(all_rules(), found["profile"].value, found["severity"].value)
    if as_json:
        value = {k: {"value": s.value, "origin": s.origin} for k, s in found.items()}
        click.echo(json.dumps({"file": str(file) if file else None, "settings": value}, indent=2))
        return
    from verifier.text import printable  # noqa: PLC0415

    for key, setting in found.items():
        shown = (
            json.dumps(setting.value, ensure_ascii=False)
            if setting.value not in ([], {}, None)
            else "-"
        )
        click.echo(f"{key:10}{printable(shown):30}  {printable(setting.origin, 2000)}")
    click.echo(f"configuration: {printable(str(file), 2000) if file else 'no file'}")
