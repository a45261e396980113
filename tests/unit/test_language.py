# SPDX-License-Identifier: Apache-2.0
"""The worst habits of language do not come back: in help texts, README and docs, rules, messages
and docstrings. Text in backticks, code blocks and output is not checked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.paths import ROOT
from verifier.cli import cli
from verifier.rules import all_rules

UNITS = "tokens?|bytes?|codes?|scales?|lines?|tests?|nats|bits|checks?|files?|windows?|shards?"
PER = "token|tensor|weight|rule|document|second|byte|step|layer|block|row|expert|module|kind"
HABITS = {
    "check, validate, evaluate, compare": r"\b(un)?judg(e|es|ed|ing|ment)\b",
    "report, flag, catch, detect": r"\b(tells?|told|speaks?|spoken)\b(?! apart)",
    "fix": r"\bmend(s|ed|ing)?\b",
    "impact": r"\bhurts?\b",
    "wrong, different, unexpected": r"\banother (dtype|shape|format|layout|order|length|width)\b",
    "is in, is recorded in": r"\bstands? (in|at|beside|there|on|under)\b",
    "next to, together with": r"\bbeside\b",
    "is not a": r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b|such\b|other\b)",
    "per": rf"\b({UNITS}) an? ({PER})\b",
    "again, re-, resumes": r"\b(anew|afresh|go(es)? on)\b",
    "silently": r"\b(without a word|in silence)\b",
    "8%": r"\d %(?!\()",
    "the right number": r"\b1 (files|tensors|errors|warnings|documents|modules|shards|findings)\b",
    "top-1 token": r"\blikeliest\b",
    "pass-through": r"\buntouched\b",
    "linear layers": r"\blinears\b(?! values|:)",
    "auxiliary files": r"\bside files?\b",
    "transposed, interleaved": r"\b(woven|turned and)\b",
    "expected": r"\bbelongs? there\b",
}
"""What to write -> what not to write."""
PATTERNS = {better: re.compile(pattern) for better, pattern in HABITS.items()}


def habits(text: str) -> list[str]:
    """Return what is wrong in a text: the words, and what to write instead."""
    found = []
    for better, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            context = " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
            found.append(f"{match[0]!r} (write: {better}): … {context} …")
    return found


def prose(page: str) -> str:
    """Return a Markdown page without code, output and links."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    page = re.sub(r"^ {4}.*$", "", page, flags=re.M)
    page = re.sub(r"``[^`]+``|`[^`\n]+`", "", page)
    return re.sub(r"\]\([^)]*\)", "]", page)


def strings(source: Path) -> Iterator[str]:
    """Yield the docstrings of a module, and its other strings that are prose."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            yield re.sub(r"``[^`]+``|`[^`\n]+`", "", "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield re.sub(r"``[^`]+``|`[^`\n]+`", "", node.value)


def helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield (command, help text) of a command and all below it."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from helps(child, click.Context(child, parent=context, info_name=name))


HELPS = dict(helps(cli, click.Context(cli, info_name="ckptgate")))
DOCS = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
SOURCES = sorted(
    str(p.relative_to(ROOT))
    for package in ("ckptgate", "verifier", "exporter")
    for p in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("command", HELPS)
def test_help(command: str) -> None:
    found = habits(HELPS[command])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", DOCS)
def test_docs(page: str) -> None:
    found = habits(prose((ROOT / page).read_text(encoding="utf-8")))
    assert not found, "\n".join(found)


def test_rules() -> None:
    for rule in all_rules().values():
        assert not habits(f"{rule.title}. {rule.doc}"), rule.id


@pytest.mark.parametrize("source", SOURCES)
def test_messages_and_docstrings(source: str) -> None:
    found = [h for text in strings(ROOT / source) for h in habits(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "bad",
    [
        "this is judged by the base",
        "the run told nothing",
        "a file that is no index",
        "0.7 nats a token",
        "the 99.9 % quantile",
        "1 files",
        "it stands in the header",
    ],
)
def test_the_check_sees_old_habits(bad: str) -> None:
    assert habits(bad)


@pytest.mark.parametrize(
    "good",
    [
        "there is no tensor of this name",
        "it is no longer needed",
        "0.7 nats per token",
        "an 8% margin",
        "f %(name)s",
        "1 file and 2 files",
    ],
)
def test_the_check_accepts_plain_english(good: str) -> None:
    assert not habits(good)
