# SPDX-License-Identifier: Apache-2.0
"""Writing files: completely or not at all, and only where they fit."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from verifier.errors import MachineError, UsageError


def require_writable(file: str | os.PathLike[str]) -> None:
    """Create a file's directory and check that the file can be written, before any work is done.

    Raises:
        UsageError: it is a directory or is not writable.
    """
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot create its directory") from error
    if is_directory:
        raise UsageError(f"{path} is a directory; give a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} is not writable")


def require_space(folder: Path, needed: int, subject: str, variable: str) -> None:
    """Refuse a download that the disk cannot hold.

    Raises:
        MachineError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{subject}: {needed:,} bytes are to be downloaded, and {folder} has {free:,} free; "
            f"set {variable} to a larger disk"
        )


def write_atomic(file: str | os.PathLike[str], text: str | bytes) -> None:
    """Write bytes, or text as UTF-8, to a temporary file in the same directory, sync, and rename.

    The target of a symlink is replaced. A path that is not a regular file (a pipe, /dev/null) is
    written to directly.

    Raises:
        MachineError: it could not be written; the previous file is unchanged.
    """
    path = Path(os.path.realpath(file))
    data = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
    temporary = ""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".ckptgate-", dir=path.parent)
        with os.fdopen(handle, "wb") as out:
            os.fchmod(out.fileno(), mode)
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
