# SPDX-License-Identifier: Apache-2.0
"""The command ``ckptgate``, also run as ``python -m ckptgate``."""

from __future__ import annotations

import sys
from typing import NoReturn

from ckptgate.shadowing import shadowing_package


def main() -> NoReturn:
    """Run the command line and exit; with code 4 if another package shadows one of ckptgate's."""
    problem = shadowing_package()
    if problem:
        sys.stderr.write(f"ckptgate: {problem}\n")
        sys.exit(4)
    from verifier.cli import main as run  # noqa: PLC0415  (it may be a stranger's)

    run()


if __name__ == "__main__":
    main()
