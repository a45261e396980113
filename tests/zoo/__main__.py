# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.zoo``: the whole zoo (results.json), or single families."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path

from tests.zoo.families import BY_NAME, FAMILIES
from tests.zoo.run import OK, defects, judge, standing, working

RESULTS = Path(__file__).parent / "results.json"


def main(argv: list[str]) -> int:
    """Run families and print, or write results.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="these only, printed whole")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write {RESULTS.name}; docs come from tools/make_docs.py",
    )
    given = parser.parse_args(argv)
    if given.families:
        for name in given.families:
            print(json.dumps(judge(BY_NAME[name]), indent=1))
        return 0
    started = time.monotonic()
    rows = []
    for family in FAMILIES:
        found = judge(family)
        rows.append(found)
        said = ", ".join(working(found)) if found["built"] == OK else found["built"]
        print(
            f"{family.name:24} {standing(found):10} {found['seconds']:5.1f} s  {said}", flush=True
        )
    counts = Counter(standing(r) for r in rows)
    found = {
        "command": "python -m tests.zoo --write",
        "versions": {
            p: importlib.metadata.version(p)
            for p in ("ckptgate", "transformers", "torch", "safetensors")
        }
        | {"python": platform.python_version()},
        "counts": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - started),
        "families": rows,
    }
    if given.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        for line in defects(row):
            print("defect:", line)
    print(json.dumps(found["counts"]), f"{found['seconds']} s")
    return 1 if counts["defect"] or counts["not built"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
