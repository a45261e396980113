# SPDX-License-Identifier: Apache-2.0
"""How much memory is left."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that a process may still take on a device; on the CPU, within its control
    group.
    """
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415

        try:
            return int(torch.cuda.mem_get_info(torch.device(device))[0])
        except (RuntimeError, AssertionError, ValueError):
            return 0
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration, ValueError):
        found = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found, _left_in_group(found)))


def _left_in_group(without: int) -> int:
    """Return what the control group (version 2) leaves, file cache that can be dropped counted as
    free.
    """
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # "max", or no such file
        return without
