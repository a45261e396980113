# SPDX-License-Identifier: Apache-2.0
"""Logits that are not finite in what lm-eval runs, which reports answers and likelihoods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class LogitsWatch:
    """Whether some forward pass had logits that are not finite."""

    nonfinite: bool = False

    def documents(self, samples: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[int]:
        """Return the documents with logits that are not finite: those whose likelihood shows it,
        else all, since a forward pass does not say whose it was.

        Args:
            samples: lm-eval's, each with ``doc_id`` and ``resps``.
            numbers: the documents that were scored.
        """
        documents = {int(sample["doc_id"]) for sample in samples if _has_nonfinite(sample["resps"])}
        if self.nonfinite and not documents:
            return sorted(numbers)
        return sorted(documents)


@contextmanager
def watching(model: Any) -> Iterator[LogitsWatch]:
    """Watch the logits of a transformers model while the context is open."""
    watch = LogitsWatch()

    def hook(_module: Any, _args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and not watch.nonfinite:
            watch.nonfinite = not bool(torch.isfinite(logits).all())

    handle = model.register_forward_hook(hook)
    try:
        yield watch
    finally:
        handle.remove()


def _has_nonfinite(value: Any) -> bool:
    """Whether a number in a nested response is not finite."""
    if isinstance(value, list | tuple):
        return any(_has_nonfinite(item) for item in value)
    return isinstance(value, float) and not math.isfinite(value)
