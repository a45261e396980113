# SPDX-License-Identifier: Apache-2.0
"""A house rule: what leaves the house has a licence beside it."""

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules import Context, rule


@rule("ACME101", "no licence file", severity="error", depth="header", unit="folders")
def check(ctx: Context) -> Iterator[Finding]:
    """A release has a file LICENSE beside its weights.

    **Mend.** Copy the base model's licence into the folder.
    """
    ctx.tally.see()
    if "LICENSE" not in ctx.checkpoint.files:
        yield ctx.finding("no LICENSE beside the weights", expected="a file LICENSE")
