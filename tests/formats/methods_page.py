# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md, from what the methods and their twins got."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.formats.methods import METHODS, TWINS, Result
from tests.formats.render import table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "methods.md"
RESULTS = HERE / "methods.json"
BEGIN = "<!-- rendered from tests/formats/methods.json -->"


def write(results: Sequence[Result]) -> None:
    """Write the results and the page."""
    body = ",\n ".join(json.dumps(asdict(result)) for result in results)
    RESULTS.write_text(f"[\n {body}\n]\n", encoding="utf-8")
    PAGE.write_text(render(), encoding="utf-8")


def read() -> dict[str, Result]:
    """Return the committed results by name."""
    return {r["name"]: Result(**r) for r in json.loads(RESULTS.read_text(encoding="utf-8"))}


def render() -> str:
    """Return the page: its text as it is, and the table."""
    body = []
    for result in read().values():
        method = METHODS[result.name]
        clean = " ".join([result.verdict, *result.rules])
        twins = [" ".join(result.twins.get(name, ())) for name in TWINS]
        body.append([method.title, f"`{method.format.weights or 'base'}`", clean, *twins])
    lines = table(["method", "`--weights`", "sound", *TWINS], body)
    count = sum(len(r.twins) for r in read().values())
    failed = sum(t[0] == "failed" for r in read().values() for t in r.twins.values())
    sound = sum(r.verdict == "passed" and not r.rules for r in read().values())
    summary = (
        f"{sound} of {len(body)} sound methods pass without an error; {failed} of {count} broken"
        " twins fail. One wrong scale among many is not seen where values are other than the"
        " nearest throughout."
    )
    page = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    return page + "\n".join([BEGIN, "", summary, "", *lines]) + "\n"
