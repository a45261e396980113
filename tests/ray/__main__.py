# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.ray --write``: units on Ray, and the outcome of each test in results.json."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.outcomes import run_and_write

RESULTS = Path(__file__).with_name("results.json")

if __name__ == "__main__":
    tests = ["tests/ray", "tests/units", "-k", "ray"]
    sys.exit(run_and_write("python -m tests.ray", tests, RESULTS, ("ckptgate", "ray", "torch")))
