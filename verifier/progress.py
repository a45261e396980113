# SPDX-License-Identifier: Apache-2.0
"""How long work reports that it advances. Libraries call what they are given and print nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from time to time, possibly by several threads."""

    def __call__(self, done: int, total: int, detail: str = "", /) -> None:
        """Take how much is done.

        Args:
            done: units that are done: bytes, modules, documents.
            total: all units, 0 where the number is not known yet.
            detail: where the work is, for people: ``shard 3 of 52``.
        """


def no_progress(_done: int, _total: int, _detail: str = "", /) -> None:
    """Ignore progress."""
