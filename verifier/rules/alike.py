# SPDX-License-Identifier: Apache-2.0
"""Rules that need neither names nor bytes ask about one module of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.schemes import Module


def each_quantized(
    ctx: Context, check: Callable[[Context, Module], Iterator[Finding]]
) -> Iterator[Finding]:
    """Yield what a check finds in each quantized module, in file order.

    Args:
        ctx: of the running rule.
        check: yields findings that depend on leaves, dtypes, shapes and declarations only. It is
            called with the first module of each group, and with the others of a group only if it
            found something; it does not tally.
    """
    groups = ctx.candidate.module_groups
    flawed = [group for group in groups if any(check(ctx, group.first))]
    for module in ctx.candidate.in_file_order(flawed):
        yield from check(ctx, module)
