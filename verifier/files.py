# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from verifier.errors import MachineError, UsageError


def require_writable(file: str | os.PathLike[str]) -> None:
    """Make a file's folder, and refuse a path that cannot be written before the work is done.

    Raises:
        UsageError: it is a folder, or lies where nothing can be written.
    """
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: its folder cannot be made") from error
    if folder:
        raise UsageError(f"{path}: a folder; give a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path}: cannot be written")


def write_atomic(file: str | os.PathLike[str], text: str | bytes) -> None:
    """Write bytes, or text as UTF-8, under a temporary name beside a file, sync, and rename; a
    symlink's target is replaced.

    What is no regular file (a pipe, /dev/null) is written to as it is.

    Raises:
        MachineError: it could not be written; what was there before is untouched.
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
