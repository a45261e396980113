# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities over 64 tokens from the token before: a formula, so that two processes find the
same.
"""

from __future__ import annotations

import math

WORDS = 64


def row(previous: int) -> list[float]:
    """Return the log-probabilities of the token after ``previous``."""
    logits = [3 * math.sin(0.7 * (previous + 1) * (i + 1)) for i in range(WORDS)]
    total = math.log(sum(math.exp(x) for x in logits))
    return [x - total for x in logits]
