# SPDX-License-Identifier: Apache-2.0
"""Commands as a user runs them, against a cluster that runs already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def ckptgate_in(folder: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``ckptgate ARGUMENTS --ray ADDRESS -q`` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "ckptgate", *arguments, "--ray", address, "-q"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
