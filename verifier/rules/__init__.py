# SPDX-License-Identifier: Apache-2.0
"""The rules. `all_rules` is the table; docs/add-a-rule.md explains how to add one."""

from verifier.rules.context import Context, Tally
from verifier.rules.plugins import all_rules
from verifier.rules.registry import DEPTHS, INCLUDED, Check, Depth, Rule, rule

__all__ = ["DEPTHS", "INCLUDED", "Check", "Context", "Depth", "Rule", "Tally", "all_rules", "rule"]
