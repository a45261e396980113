# SPDX-License-Identifier: Apache-2.0
"""Every way in which a command can end other than well, and its exit code.

    CkptgateError            4  the machine or the tool is at fault
    ├── UsageError           2  wrong before a header is read, or one option against another
    │   └── MissingExtra     2  an optional dependency is not installed
    ├── ContentError         1  depends on the contents of a checkpoint
    │   ├── ContainerError   1  a file that is no safetensors, a folder without any
    │   ├── PlanError        1  nothing or only part matched, unequal expert sets
    │   ├── UnsupportedConversion 1  a layout that cannot be turned into the hub's, or back
    │   ├── EncodeError      1  NaN or Inf in a weight, a width that the block does not divide
    │   └── IncomparableError 1 scores of unlike protocols
    └── MachineError         4  disk, I/O, memory

The exit codes 0, 1, 2, 3 and 4 mean the same in every command; 130 and 143 are signals.
"""

from __future__ import annotations

EXIT_CODES = {
    0: "passed, or done",
    1: "failed: a finding at error level, a proved regression, or what else depends on a checkpoint's contents",
    2: "usage: wrong before a header is read (missing path, unknown recipe, output exists, extra missing)",
    3: "inconclusive: nothing quantized, a required rule examined nothing, an inconclusive gate",
    4: "error: I/O or internal error (nothing is known about the checkpoint)",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}


class CkptgateError(Exception):
    """Root of all errors that a command reports in one message; ``exit_code`` is what it ends
    with.
    """

    exit_code = 4


class UsageError(CkptgateError):
    """The call is wrong, whatever the checkpoint holds."""

    exit_code = 2


class MissingExtra(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'ckptgate[{extra}]'")
        self._given = (what, extra)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return MissingExtra, self._given  # it travels between processes


class ContentError(CkptgateError):
    """What a checkpoint holds does not allow what was asked."""

    exit_code = 1


class ContainerError(ContentError):
    """A file cannot be read as what it must be."""


class PlanError(ContentError):
    """The checkpoints do not admit the export that was asked for."""


class UnsupportedConversion(ContentError):
    """A tensor cannot be brought from one layout to the other: its key, the operation and the
    family are named.
    """

    def __init__(self, key: str, operation: str, family: str, why: str) -> None:
        super().__init__(f"{key}: {operation} ({family}): {why}")
        self._given = (key, operation, family, why)

    def __reduce__(self) -> tuple[type[UnsupportedConversion], tuple[str, str, str, str]]:
        return UnsupportedConversion, self._given


class EncodeError(ContentError):
    """A weight cannot be written in the format that was asked for."""


class IncomparableError(ContentError):
    """Two scores were not made under one protocol; the key and both values are named."""


class MachineError(CkptgateError):
    """Disk, I/O or memory failed."""
