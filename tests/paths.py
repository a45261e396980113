# SPDX-License-Identifier: Apache-2.0
"""Where the repository and the tests' own data are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
