# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults --write``: every fault, and the outcome of each test in results.json."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.outcomes import run_and_write

RESULTS = Path(__file__).with_name("results.json")
TESTS = ["tests/faults", "tests/unit/exporter/stream/test_interrupted.py"]

if __name__ == "__main__":
    os.environ["CKPTGATE_FAULTS"] = "1"
    sys.exit(run_and_write("python -m tests.faults", TESTS, RESULTS, ("ckptgate", "torch")))
