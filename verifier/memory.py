# SPDX-License-Identifier: Apache-2.0
"""Free memory of a device."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that this process can still allocate on a device; on the CPU, within its
    control group.
    """
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415

        try:
            return int(torch.cuda.mem_get_info(torch.device(device))[0])
        except (RuntimeError, AssertionError, ValueError):
            return 0
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        available = int(kilobytes) * 1024
    except (OSError, StopIteration, ValueError):
        available = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(available, _free_in_group(available)))


def _free_in_group(default: int) -> int:
    """Return the free bytes of the control group (version 2), or ``default`` without a limit.

    File cache that can be dropped counts as free.
    """
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # "max", or no such file
        return default
