# SPDX-License-Identifier: Apache-2.0
"""The rules. `all_rules` is the table; README.md beside this file tells how to add one."""

from verifier.rules.context import Context, Tally
from verifier.rules.registry import DEPTHS, Depth, Rule, all_rules, rule

__all__ = ["DEPTHS", "Context", "Depth", "Rule", "Tally", "all_rules", "rule"]
