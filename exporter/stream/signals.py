# SPDX-License-Identifier: Apache-2.0
"""Signals while threads work: held back until they can do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back; yield a function that lets the first one that came act.

    A handler that raises while this thread starts others or waits for them may leave a lock of
    theirs locked, and they never end. At the end of the context a signal that came acts too, and
    the handlers are those of before. In a thread other than the main one, nothing is held.
    """
    came: list[int] = []
    handlers: dict[int, Any] = {}

    def hold(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    def restore() -> None:
        while handlers:
            signal.signal(*handlers.popitem())

    def act() -> None:
        if came:
            number = came[0]
            handler = handlers[number]
            came.clear()
            restore()
            handler(number, None)

    if threading.current_thread() is threading.main_thread():
        for number in _HELD:
            handler = signal.getsignal(number)
            if callable(handler):
                signal.signal(number, hold)
                handlers[number] = handler
    try:
        yield act
    finally:
        act()
        restore()
