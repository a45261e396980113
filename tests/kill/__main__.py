# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.kill``: 200 seeded ``kill -9`` over export, merge, repair, score and
calibrate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tests.kill.commands import COMMANDS, make_inputs
from tests.kill.run import Outcome, killed, undisturbed

RESULTS = Path(__file__).with_name("results.json")


def main(argv: list[str]) -> int:
    """Run and print, or write results.json; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ckptgate-kill-") as name:
        folder = Path(name)
        inputs = make_inputs(folder)
        known = {c.name: undisturbed(c, inputs, folder / "undisturbed" / c.name) for c in COMMANDS}
        print({name: round(run.seconds, 2) for name, run in known.items()}, file=sys.stderr)
        outcomes: list[Outcome] = []
        with suppress(KeyboardInterrupt):  # what was done until then counts
            for seed in range(options.seeds):
                outcomes.append(killed(seed, known, inputs, folder / "killed"))
                shutil.rmtree(folder / "killed")
                print(outcomes[-1], file=sys.stderr, flush=True)
    wrong = [o for o in outcomes if o.wrong]
    result = {
        "command": f"python -m tests.kill --seeds {len(outcomes)} --write",
        "seeds": len(outcomes),
        "kills": dict(sorted(Counter(o.command for o in outcomes for _ in range(o.kills)).items())),
        "wrong": [o.as_json() for o in wrong],
        "versions": {p: version(p) for p in ("ckptgate", "torch", "numpy")},
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.write:
        RESULTS.write_text(text)
    print(text, end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
