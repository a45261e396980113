# SPDX-License-Identifier: Apache-2.0
"""Every error that a command reports, and its exit code.

    CkptgateError            4  I/O or internal error
    ├── UsageError           2  rejected before any file is read, or contradicting options
    │   ├── MissingExtra     2  an optional dependency is not installed
    │   ├── NotACheckpointError 2 a directory that holds no safetensors checkpoint
    │   └── ServerRefusedError 2  a server does not hand out a file
    ├── ContentError         1  depends on the contents of a checkpoint
    │   ├── ContainerError   1  a file that is not safetensors
    │   ├── PlanError        1  nothing or only a part matched, different expert sets
    │   ├── UnsupportedConversion 1  a layout that cannot be converted to the hub's, or back
    │   ├── EncodeError      1  NaN or Inf in a weight, a width not divisible by the block
    │   └── IncomparableError 1 scores under different protocols
    └── MachineError         4  disk, I/O, memory
        └── WebPageError     4  a server answered with an HTML page instead of a file

The exit codes 0, 1, 2, 3 and 4 mean the same in every command; 130 and 143 are signals.
"""

from __future__ import annotations

EXIT_CODES = {
    0: "passed, or done",
    1: "failed: a finding at error level, a statistically significant regression, or anything else "
    "that depends on the checkpoint's contents",
    2: "usage error: rejected before any tensor is read (missing path, not a checkpoint, unknown "
    "recipe, output exists, missing extra)",
    3: "inconclusive: nothing quantized, something not checked, a required rule checked nothing, an"
    " inconclusive gate",
    4: "error: I/O or internal error (nothing is known about the checkpoint)",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}


class CkptgateError(Exception):
    """Root of all errors that a command reports in one message; the command exits with
    ``exit_code``.
    """

    exit_code = 4


class UsageError(CkptgateError):
    """The call is wrong, whatever the checkpoint contains."""

    exit_code = 2


class MissingExtra(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the extra '{extra}': pip install 'ckptgate[{extra}]'")
        self._arguments = (feature, extra)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return MissingExtra, self._arguments  # errors are sent between processes


class NotACheckpointError(UsageError):
    """A directory holds something other than a safetensors checkpoint; ``uri`` is its address."""

    def __init__(self, message: str, uri: str) -> None:
        super().__init__(message)
        self.uri = uri

    def __reduce__(self) -> tuple[type[NotACheckpointError], tuple[str, str]]:
        return NotACheckpointError, (str(self), self.uri)


class ServerRefusedError(UsageError):
    """A server does not hand out a file; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[ServerRefusedError], tuple[str, int]]:
        return ServerRefusedError, (str(self), self.status)


class ContentError(CkptgateError):
    """The contents of a checkpoint rule out the request."""

    exit_code = 1


class ContainerError(ContentError):
    """A file does not have the required format."""


class PlanError(ContentError):
    """The checkpoints rule out the requested export."""


class UnsupportedConversion(ContentError):
    """A tensor cannot be converted between layouts; the message names key, operation and family."""

    def __init__(self, key: str, operation: str, family: str, reason: str) -> None:
        super().__init__(f"{key}: {operation} ({family}): {reason}")
        self._arguments = (key, operation, family, reason)

    def __reduce__(self) -> tuple[type[UnsupportedConversion], tuple[str, str, str, str]]:
        return UnsupportedConversion, self._arguments


class EncodeError(ContentError):
    """A weight cannot be encoded in the requested format."""


class IncomparableError(ContentError):
    """Two scores used different protocols; the message names the key and both values."""


class MachineError(CkptgateError):
    """Disk, I/O or memory failed."""


class WebPageError(MachineError):
    """A server answered with an HTML page instead of a file."""
