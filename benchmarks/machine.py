# SPDX-License-Identifier: Apache-2.0
"""What benchmarks ask of the machine: the memory of a process, and a page cache that is full."""

from __future__ import annotations

from pathlib import Path

LEFT_FREE = 400_000_000
"""Bytes that `fill_page_cache` leaves."""
MOST_FILES = 4
"""Files of one call: within a container, what the machine has unused may never fall."""
PIECE = 16 << 20


def allocated(pid: int) -> float:
    """Return the megabytes that a process and its children have allocated, pages that they share
    counted once; 0 where it has ended. Pages of files, libraries among them, do not count.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task").glob("*/children")
        pids = [int(child) for file in children for child in file.read_text().split()]
    except OSError:
        return 0.0
    own = sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return own / 1000 + sum(map(allocated, pids))


def fill_page_cache(folder: Path) -> None:
    """Read files of holes until little memory is unused, as on a machine that has run for a day.

    A virtual machine may give memory that it does not use back to its host within seconds. The
    first write to a page then takes ten times as long, and what is measured is the host.
    """
    first = len([*folder.iterdir()])
    buffer = memoryview(bytearray(PIECE))
    for number in range(first, first + MOST_FILES):
        unused = _unused()
        if unused <= LEFT_FREE + PIECE:
            return
        path = folder / f"holes-{number}"
        with path.open("wb") as handle:
            handle.truncate(unused - LEFT_FREE)
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _unused() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemFree")) * 1024
