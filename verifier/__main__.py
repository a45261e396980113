# SPDX-License-Identifier: Apache-2.0
"""``python -m verifier`` is ``ckptgate``."""

from verifier.cli import main

if __name__ == "__main__":
    main()
