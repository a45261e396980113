# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint from Python, and print what fails with its fix.

python check_release.py CHECKPOINT [BASE]
"""

from __future__ import annotations

import sys

import ckptgate


def main(checkpoint: str, base: str | None = None) -> int:
    """Check a checkpoint, print the findings that fail, and return the exit code."""
    report = ckptgate.check(checkpoint, base=base, depth="payload")
    for finding in report.failing:
        print(f"{finding.rule}: {finding.message} ({finding.where.tensor or finding.where.file})")
        print(f"  fix: {report.summary.advice[finding.rule].fix}")
    print(report.verdict)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
