# SPDX-License-Identifier: Apache-2.0
"""Signals are held back while threads are started and waited for."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from pathlib import Path

import pytest

from exporter.stream.shards import StoppedError, Task, digest_of
from exporter.stream.signals import signals_held
from exporter.stream.write import RESULT, STATE, _Run, record


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request: pytest.FixtureRequest) -> signal.Signals:
    return signal.Signals(request.param)


@pytest.fixture
def received(number: signal.Signals):
    """Record the signals that reach the handler of before."""
    came: list[int] = []
    before = signal.signal(number, lambda n, _: came.append(n))
    yield came
    signal.signal(number, before)


def test_a_signal_acts_when_it_is_let(number: signal.Signals, received: list[int]) -> None:
    with signals_held() as act:
        act()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert received == []
        act()
        assert received == [number]
        signal.raise_signal(number)  # what comes now is no longer held
        assert received == [number] * 2


def test_a_signal_acts_at_the_end(number: signal.Signals, received: list[int]) -> None:
    with signals_held():
        signal.raise_signal(number)
        assert received == []
    assert received == [number]


def test_the_handlers_are_those_of_before(number: signal.Signals, received: list[int]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(ValueError, match="x"), signals_held():
        assert signal.getsignal(number) is not before
        raise ValueError("x")
    assert signal.getsignal(number) is before
    assert received == []


def test_an_interrupt_ends_the_context() -> None:
    with pytest.raises(KeyboardInterrupt), signals_held() as act:
        signal.raise_signal(signal.SIGINT)
        act()
        pytest.fail("the interrupt was lost")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_holds_nothing(number: signal.Signals, received: list[int]) -> None:
    before, seen = signal.getsignal(number), []

    def work() -> None:
        with signals_held() as act:
            act()
            seen.append(signal.getsignal(number))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    assert received == []


def test_shards_are_verified_with_signals_held(tmp_path: Path) -> None:
    todo = [Task(f"model-{i}.safetensors", ()) for i in range(3)]
    (tmp_path / RESULT).mkdir()
    for task in todo:
        (tmp_path / RESULT / task.file).touch()
    entry = record(hashlib.sha256().hexdigest(), 0, [])
    (tmp_path / STATE).write_text(json.dumps({"shards": {task.file: entry for task in todo}}))
    taken: list[int] = []

    def progress(nbytes: int) -> None:
        signal.raise_signal(signal.SIGINT)
        taken.append(nbytes)

    with pytest.raises(KeyboardInterrupt):
        _Run(tmp_path / RESULT).resume(todo, 2, progress)
    assert taken == [0]
    assert _Run(tmp_path / RESULT).resume(todo, 2, taken.append) == []


def test_a_digest_ends_when_it_must_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (3 << 20))
    stop = threading.Event()
    with (tmp_path / "file").open("rb") as handle:
        assert digest_of(handle.fileno(), stop) == hashlib.sha256(b"x" * (3 << 20)).hexdigest()
        stop.set()
        with pytest.raises(StoppedError):
            digest_of(handle.fileno(), stop)
