# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.slurm --write``: job arrays on Slurm, and the outcome of each test in
results.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.outcomes import run_and_write
from tests.slurm.cluster import MISSING, slurm_version

RESULTS = Path(__file__).with_name("results.json")

if __name__ == "__main__":
    if MISSING:
        sys.exit(f"{', '.join(MISSING)}: not found; install the packages slurm-wlm and munge")
    os.environ["CKPTGATE_SLURM"] = "1"
    programs = {"slurm": slurm_version()}
    packages = ("ckptgate", "torch")
    sys.exit(run_and_write("python -m tests.slurm", ["tests/slurm"], RESULTS, packages, programs))
