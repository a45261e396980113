# SPDX-License-Identifier: Apache-2.0
"""Whether a directory can be written, decided without torch."""

from __future__ import annotations

import os
from pathlib import Path

from verifier.errors import UsageError


def check_out(out: Path, *, overwrite: bool, inputs: tuple[str, ...]) -> None:
    """Refuse an OUT that exists (without ``overwrite``), that is or holds an input, or that is not
    a checkpoint directory.

    Raises:
        UsageError: OUT cannot be used.
    """
    target = out.resolve()
    for uri in inputs:
        if "://" not in uri:
            path = Path(uri).resolve()
            if path == target or path.is_relative_to(target):
                raise UsageError(f"{out}: is the directory of an input")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: its parent directory {out.parent} does not exist")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise out_exists(out)
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out}: exists and is not a directory")
    if any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise UsageError(f"{out}: exists and is not a checkpoint; it is not overwritten")


def out_exists(out: Path) -> UsageError:
    """Return the error of an OUT that exists."""
    return UsageError(f"{out}: already exists; use --overwrite to replace it")


def work_folder(out: Path) -> Path:
    """Return the work directory of an output, next to it."""
    return out.with_name(f".{out.name}.ckptgate-work")
