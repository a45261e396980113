# SPDX-License-Identifier: Apache-2.0
"""The texts of every rule: contract, headings, titles."""

from __future__ import annotations

import re
import sys

import pytest

from verifier.rules import Rule
from verifier.rules.registry import built_in_rules

RULES = list(built_in_rules().values())
HEADINGS = ["What it does", "Why it happens", "Impact", "Fix"]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_docstring(rule: Rule) -> None:
    contract, _, rest = rule.doc.partition("\n")
    assert contract.endswith(".") and len(contract) <= 93
    assert re.findall(r"^\*\*(.+)\.\*\*", rest, flags=re.MULTILINE) == HEADINGS
    for section in re.split(r"^\*\*.+\.\*\*", rest, flags=re.MULTILINE)[1:]:
        assert section.strip().endswith((".", ".``"))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_title_and_engines(rule: Rule) -> None:
    assert sys.modules[rule.check.__module__].__doc__ == f"{rule.id}: {rule.title}."
    for engine, (_, effect) in rule.engines.items():
        assert effect and not effect.endswith("."), engine
