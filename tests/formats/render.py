# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md, from what the matrix wrote."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.formats.corruptions import BY_NAME, CORRUPTIONS
from tests.formats.formats import Format
from tests.formats.matrix import CRASH, EXACT, INCONCLUSIVE, MISSED, NEEDS_BASE, Row, grade_of
from tests.formats.table import GROUPS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "formats.md"
RESULTS = HERE / "results.json"
LETTERS = {EXACT: "E", INCONCLUSIVE: "i", MISSED: "m", NEEDS_BASE: "b", CRASH: "X"}
OTHER_LETTER = "o"
ROLES = {
    "tensor_scale": "tensor scale",
    "inputs": "input scale",
    "smooth": "pre_quant_scale",
    "kv": "KV scale",
    "zeros": "zero points",
    "order": "g_idx",
    "shape": "weight_shape",
}
MAIN = [c.name for c in CORRUPTIONS if not c.name.startswith(tuple(f"{r}_" for r in ROLES))]
INTRODUCTION = """\
`{command}` (`tox -e formats`), {versions}: tiny checkpoints in {formats} formats, made by an
encoder in `tests/formats` that shares nothing with the packages, and {cells:,} corruptions of
them, each one edit of the clean twin. Every one is checked at depth payload, without its BF16
base and with it.

A cell has two letters, without the base and with it: **E** the check fails and a finding names
the cause at its place; **o** it fails, or warns, by another finding; **i** inconclusive; **m**
missed; **b** nobody can know it without the base; **X** crash; blank: the format has no place for
it. Of {total:,} cells: {counts}.

In shapes, `o` and `i` are the layer's dimensions, out and in.
"""


def write(results: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the results, a line per format, and the page."""
    head = json.dumps(results, indent=1).removesuffix("\n}")
    body = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    RESULTS.write_text(f'{head},\n "formats": [\n  {body}\n ]\n}}\n', encoding="utf-8")
    PAGE.write_text(render(), encoding="utf-8")


def read() -> dict[str, Row]:
    """Return the committed rows by name."""
    return {r["name"]: Row(**r) for r in json.loads(RESULTS.read_text())["formats"]}


def render() -> str:
    """Return the page."""
    results = json.loads(RESULTS.read_text())
    rows = read()
    grades = [grade_of(g) for row in rows.values() for pair in row.cells.values() for g in pair]
    text = INTRODUCTION.format(
        command=results["command"],
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        formats=len(rows),
        cells=sum(len(row.cells) for row in rows.values()),
        total=len(grades),
        counts=", ".join(f"{grades.count(name):,} {name}" for name in sorted(set(grades))),
    )
    note = "Rendered from `tests/formats/results.json`; nothing here is written by hand."
    lines = ["# Formats", "", note]
    for paragraph in text.strip().split("\n\n"):
        lines += ["", *textwrap.wrap(paragraph, 120)]
    for title, formats in GROUPS.items():
        present = [f for f in formats if f.name in rows]
        lines += ["", f"## {title}", "", *_tensors(present, rows)]
        lines += ["", *_cells(present, rows), "", *_roles(present, rows)]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def _tensors(formats: Sequence[Format], rows: dict[str, Row]) -> list[str]:
    body = []
    for fmt in formats:
        leaves = (f"`{leaf}` {shape}" for leaf, shape in rows[fmt.name].tensors.items())
        body.append([f"`{fmt.name}`", fmt.title, "<br>".join(leaves), fmt.readers])
    return table(["format", "what it is", "tensors", "readers"], body)


def _cells(formats: Sequence[Format], rows: dict[str, Row]) -> list[str]:
    body = []
    for fmt in formats:
        row = rows[fmt.name]
        clean = " / ".join(dict.fromkeys([*row.header, *row.clean]))
        letters = [_letters(row.cells.get(name)) for name in MAIN]
        body.append([f"`{fmt.name}`", clean, *letters])
    return table(["format", "clean", *(BY_NAME[name].what for name in MAIN)], body)


def _roles(formats: Sequence[Format], rows: dict[str, Row]) -> list[str]:
    """Return the table of the tensors that only some formats have."""
    prefixes = [p for p in ROLES if any(_of_role(rows[f.name], p) for f in formats)]
    body = []
    for fmt in formats:
        cells = [_of_role(rows[fmt.name], prefix) for prefix in prefixes]
        if any(cells):
            body.append([f"`{fmt.name}`", *cells])
    heads = []
    for prefix in prefixes:
        kinds = [c.name.removeprefix(f"{prefix}_") for c in CORRUPTIONS if _has(c.name, prefix)]
        heads.append(f"{ROLES[prefix]}: {', '.join(kinds).replace('_', ' ')}")
    return table(["format", *heads], body) if body else []


def _has(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}_")


def _of_role(row: Row, prefix: str) -> str:
    names = [c.name for c in CORRUPTIONS if _has(c.name, prefix)]
    if not any(name in row.cells for name in names):
        return ""
    return " ".join(_letters(row.cells.get(name)) or "·" for name in names)


def _letters(pair: list[str] | None) -> str:
    return "".join(LETTERS.get(grade_of(g), OTHER_LETTER) for g in pair or ())
