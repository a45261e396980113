# SPDX-License-Identifier: Apache-2.0
"""Append-only files of lines: locks, torn lines, a full disk, hostile sizes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from verifier.errors import MachineError, UsageError
from verifier.jsonl import LineFile

WRITER = """
import sys
from verifier.jsonl import LineFile
for i in range(200):
    with LineFile.open(sys.argv[1], create=True) as file:
        file.append(f"{sys.argv[2]}-{i}".encode() * 20)
"""


def contents(path: Path, limit: int | None = None) -> list[bytes]:
    with LineFile.open(path) as file:
        return [line.content for line in file.lines(limit)]


def repaired(path: Path, limit: int = 100) -> str:
    with LineFile.open(path) as file:
        return file.repair(lambda line: line.startswith(b"{"), limit)


def test_lines_are_read_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x"
    with LineFile.open(path, create=True) as file:
        for line in (b"a", b"", b"bc"):
            file.append(line)
        read = list(file.lines())
    assert [(r.number, r.content, r.end, r.terminated) for r in read] == [
        (1, b"a", 2, True),
        (2, b"", 3, True),
        (3, b"bc", 6, True),
    ]
    assert path.read_bytes() == b"a\n\nbc\n"


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)]) for n in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0] * 3
    expected = sorted(f"{n}-{i}".encode() * 20 for n in range(3) for i in range(200))
    assert sorted(contents(path)) == expected


def test_a_held_lock_is_refused_or_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with LineFile.open(path, create=True), pytest.raises(BlockingIOError):
        LineFile.open(path, wait=False)
    LineFile.open(path, wait=False).close()


def test_long_lines_are_cut_and_counted_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 5_000_000 + b"\n" + b"y" * 10 + b"\n" + b"z" * 11 + b"\n")
    assert [len(line) for line in contents(path, 10)] == [11, 10, 11]
    with LineFile.open(path) as file:
        assert [line.end for line in file.lines(10)] == [5_000_001, 5_000_012, 5_000_024]


@pytest.mark.parametrize(
    ("tail", "left", "aside", "note"),
    [
        (b"", b"", None, ""),
        (b"{}", b"{}\n", None, "had no newline"),
        (b"to", b"", b"to\n", "torn (2 bytes)"),
        (b"t" * 500, b"t" * 500 + b"\n", None, "more than 100 bytes"),
    ],
)
def test_a_torn_last_line_is_repaired(
    tmp_path: Path, tail: bytes, left: bytes, aside: bytes | None, note: str
) -> None:
    path, torn = tmp_path / "x", tmp_path / "x.torn"
    path.write_bytes(b"{1}\n" + tail)
    assert note in repaired(path)
    assert path.read_bytes() == b"{1}\n" + left
    assert (torn.read_bytes() if torn.exists() else None) == aside
    assert repaired(path) == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"{1}\nto")
    path.chmod(0o444)
    assert "read-only" in repaired(path)
    assert path.read_bytes() == b"{1}\nto"


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with LineFile.open(path, create=True) as file:
        file.append(b"first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        try:
            with pytest.raises(MachineError):
                file.append(b"x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"first\n"


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        LineFile.open(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises(UsageError):
            LineFile.open(path, error=UsageError)
        with pytest.raises(MachineError):
            LineFile.open(path)
