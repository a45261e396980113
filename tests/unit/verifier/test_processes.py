# SPDX-License-Identifier: Apache-2.0
"""Copies of a process that share its work: what they come to, how they fail, and that none is left
behind.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from verifier.errors import ContentError, MachineError, MissingExtra
from verifier.processes import can_fork, forked, spawned

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are copied on Linux only"
)

WAITING = """
import os, sys, time
from verifier.processes import can_fork, forked
assert can_fork()
for count, (_, pid) in enumerate(forked(lambda n, send: os.getpid(), range(9), 3), 1):
    print(pid, flush=True)
    if count == 4:
        time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Wait until a process has ended (a zombie has); False where it has not after ten seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_each_number_is_worked_on_once_and_elsewhere(workers: int) -> None:
    found = dict(forked(lambda n, send: (n * n, os.getpid()), [4, 2, 9, 7, 0], workers))
    assert {n: square for n, (square, _) in found.items()} == {n: n * n for n in (4, 2, 9, 7, 0)}
    pids = {pid for _, pid in found.values()}
    assert os.getpid() not in pids
    assert len(pids) <= min(workers, 5)
    assert not multiprocessing.active_children()


def test_nothing_to_do() -> None:
    assert list(forked(lambda n, send: n, [], 2)) == []


def test_errors_of_a_copy_are_those_of_the_work() -> None:
    def content(n: int, send: object) -> int:
        raise ContentError(f"file {n} is short")

    with pytest.raises(ContentError, match="file 3 is short"):
        list(forked(content, [3], 2))

    def defect(n: int, send: object) -> int:
        return {0: 0}[n]

    with pytest.raises(RuntimeError, match="KeyError: 5") as caught:
        list(forked(defect, [5], 2))
    assert "in defect" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_a_copy_that_is_killed_is_an_error_of_the_machine() -> None:
    def die(n: int, send: object) -> int:
        if n == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return n

    with pytest.raises(MachineError, match=r"died \(signal 9\).*--workers 1"):
        list(forked(die, range(4), 2))
    assert not multiprocessing.active_children()


def test_who_stops_listening_leaves_no_copy_behind() -> None:
    def slow(n: int, send: object) -> int:
        time.sleep(0.05 * n)
        return os.getpid()

    before = signal.signal(
        signal.SIGTERM, lambda *_: time.sleep(60)
    )  # a copy does not run what its parent would
    try:
        said = forked(slow, range(20), 3)
        first = next(said)
        said.close()  # type: ignore[attr-defined]
        assert gone(first[1])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_copies_end_with_their_parent(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pids = {int(parent.stdout.readline()) for _ in range(4)}
        # Ctrl-C goes to all processes of a terminal.
        os.kill(parent.pid, how) if how == signal.SIGKILL else os.killpg(parent.pid, how)
        parent.wait(20)
        assert all(gone(pid) for pid in pids)
        assert parent.stderr.read().count("Traceback") == (
            0 if how == signal.SIGKILL else 1
        )  # the parent's own


def test_a_copy_makes_no_copies() -> None:
    assert dict(forked(lambda n, send: can_fork(), [0], 1)) == {0: False}


def in_parts(task: tuple[str, int], send: Callable[[int], None]) -> str:
    name, count = task
    for part in range(count):
        send(part)
    if name == "content":
        raise ContentError("a short file")
    if name == "defect":
        raise KeyError(name)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name} {os.getpid()}"


def run_spawned(*tasks: tuple[str, int]) -> tuple[list[str], dict[int, list[int]]]:
    parts: dict[int, list[int]] = {}
    results = spawned(
        in_parts,
        tasks,
        2,
        lambda task, part: parts.setdefault(task, []).append(part),
        "died: {how}",
    )
    return results, parts


def test_parts_come_as_they_are_sent_and_results_in_order() -> None:
    results, parts = run_spawned(("a", 2), ("b", 0), ("c", 3))
    assert [result.split()[0] for result in results] == ["a", "b", "c"]
    assert len({result.split()[1] for result in results} | {str(os.getpid())}) == 4
    assert parts == {0: [0, 1], 2: [0, 1, 2]}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("content", ContentError, "a short file"),
        ("defect", RuntimeError, "KeyError: 'defect'"),
        ("killed", MachineError, r"died: signal 9"),
    ],
)
def test_a_fresh_process_that_fails_ends_all(
    name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_spawned((name, 1), ("a", 1))
    assert not multiprocessing.active_children()


def test_an_error_over_a_part_leaves_no_process_behind() -> None:
    def full(_task: int, _part: int) -> None:
        raise MachineError("the disk is full")

    with pytest.raises(MachineError, match="the disk is full"):
        spawned(in_parts, [("a", 1), ("b", 1)], 2, full, "")
    assert not multiprocessing.active_children()


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MissingExtra("the gate", "gate")))  # noqa: S301  (our own bytes)
    assert str(error) == str(MissingExtra("the gate", "gate"))
    assert error.exit_code == 2


def test_a_copy_sends_parts_before_its_result() -> None:
    def halves(n: int, send: Callable[[float], None]) -> int:
        send(n / 2)
        return n

    parts: dict[int, float] = {}
    results = dict(forked(halves, [4, 6], 2, parts.__setitem__))
    assert (results, parts) == ({4: 4, 6: 6}, {4: 2.0, 6: 3.0})
