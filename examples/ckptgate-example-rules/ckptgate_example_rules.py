# SPDX-License-Identifier: Apache-2.0
"""A house rule: every release has a license next to its weights."""

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules import Context, rule


@rule("ACME101", "no license file", severity="error", depth="header", unit="directories")
def check(ctx: Context) -> Iterator[Finding]:
    """A release has a file LICENSE next to its weights.

    **Fix.** Copy the license of the base model into the directory.
    """
    ctx.tally.see()
    if "LICENSE" not in ctx.checkpoint.files:
        yield ctx.finding("no LICENSE next to the weights", expected="a file LICENSE")
