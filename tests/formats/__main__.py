# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.formats``: the whole matrix (results.json and docs/formats.md), single formats,
or the methods (methods.json and docs/methods.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.formats import methods, methods_page, render
from tests.formats.matrix import Row, grade_of, run, shortfalls
from tests.formats.table import FORMATS


def main(argv: list[str]) -> int:
    """Run formats and print, or write the results and their page."""
    parser = argparse.ArgumentParser(prog="python -m tests.formats", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="these only, with every cell")
    parser.add_argument("--write", action="store_true", help="write results.json and the page")
    parser.add_argument("--render", action="store_true", help="write the page from results.json")
    parser.add_argument("--methods", action="store_true", help="check the methods; write both")
    options = parser.parse_args(argv)
    if options.methods:
        return _methods()
    if options.render:
        render.PAGE.write_text(render.render(), encoding="utf-8")
        return 0
    started = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ckptgate-formats-") as home:
        for name in options.formats or FORMATS:
            rows.append(run(FORMATS[name], Path(home)))
            _print(rows[-1], whole=bool(options.formats))
    counts = Counter(grade_of(g) for row in rows for pair in row.cells.values() for g in pair)
    print(f"{dict(counts)}, {time.monotonic() - started:.0f} s")
    if options.write:
        render.write({"command": "python -m tests.formats --write", "versions": _versions()}, rows)
    return bool(any(shortfalls(row) for row in rows))


def _methods() -> int:
    """Check all methods and their twins, write the results and the page."""
    with tempfile.TemporaryDirectory(prefix="ckptgate-methods-") as home:
        results = [methods.run(method, Path(home)) for method in methods.METHODS.values()]
    methods_page.write(results)
    wrong = [r.name for r in results if methods.shortfalls(r)]
    print(f"{len(results)} methods; wrong: {', '.join(wrong) or 'none'}")
    return bool(wrong)


def _print(row: Row, *, whole: bool) -> None:
    print(f"{row.name}: {' / '.join(row.clean)}", flush=True)
    wrong = shortfalls(row)
    for name, pair in row.cells.items():
        if whole or name in wrong:
            print(f"    {name}: {' / '.join(pair)}")


def _versions() -> dict[str, str]:
    packages = ("ckptgate", "numpy", "ml_dtypes")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"python": platform.python_version()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
