# SPDX-License-Identifier: Apache-2.0
"""What goes to a scoring process and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Window = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids, and for each the document that it belongs to."""


@dataclass(frozen=True)
class Job:
    """What one worker does: score some windows (``tokens``) or documents (``lm-eval``) of one model."""

    model: str
    device: str
    protocol: Literal["tokens", "lm-eval"]
    batch: int
    window: int
    documents: int
    windows: tuple[Window, ...] = ()
    texts: tuple[tuple[int, str], ...] = ()


@dataclass
class Sums:
    """Per document: nats, scored tokens (``lm-eval``: words), and the documents with logits that are not finite."""

    nats: list[float]
    tokens: list[int]
    nonfinite: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of other windows; per-document sums are additive."""
        self.nats = [a + b for a, b in zip(self.nats, other.nats, strict=True)]
        self.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        self.nonfinite = sorted({*self.nonfinite, *other.nonfinite})
        self.environment |= other.environment
