# SPDX-License-Identifier: Apache-2.0
"""Errors as JSON, for the commands that read checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import click

from verifier.cli.results import is_on_stdout
from verifier.errors import CkptgateError, UsageError


@contextmanager
def errors_as(format_: str) -> Iterator[None]:
    """Where JSON goes to stdout, print an error there as ``{"error": …}``; exit with its code.

    A usage error stays a message on stderr.
    """
    try:
        yield
    except UsageError:
        raise
    except CkptgateError as error:
        if format_ != "json" or not is_on_stdout():
            raise
        click.echo(json.dumps({"error": str(error)}, indent=2))
        raise click.exceptions.Exit(error.exit_code) from error
