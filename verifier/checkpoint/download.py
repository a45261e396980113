# SPDX-License-Identifier: Apache-2.0
"""A remote checkpoint as a local directory, for commands that build a model from it.

A hub repository is downloaded into the hub cache by huggingface_hub. Any other remote checkpoint is
copied to ``$CKPTGATE_CACHE``, by default ``~/.cache/ckptgate``, once per version of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from verifier.checkpoint.address import is_local
from verifier.checkpoint.opening import open_source
from verifier.checkpoint.source import LocalSource, Source
from verifier.files import require_space

BLOCK = 64 << 20
"""Bytes that are in memory at a time; a source fetches them in parallel requests."""


def local_directory(uri: str | os.PathLike[str]) -> str:
    """Return a local directory with the checkpoint's files; a local one as it is.

    Raises:
        UsageError: no such checkpoint.
        MachineError: it does not fit on the disk, or reading fails.
    """
    if is_local(uri):
        return os.fspath(uri)
    source = open_source(uri)
    if isinstance(source, LocalSource):  # a snapshot in the hub cache, offline
        return str(source.path)
    if source.revision:
        from verifier.checkpoint.hub import HubSource, download  # noqa: PLC0415 (an extra)

        if isinstance(source, HubSource):
            return download(source)
    return str(_copied(source))


def cache_directory() -> Path:
    """Return where copies of remote checkpoints are kept."""
    known = os.environ.get("CKPTGATE_CACHE")
    if known:
        return Path(known)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckptgate"


def _copied(source: Source) -> Path:
    files = source.files()
    versions = [[name, size, *source.version(name)] for name, size in sorted(files.items())]
    key = hashlib.sha256(json.dumps([source.uri, versions]).encode()).hexdigest()[:32]
    folder = cache_directory() / "checkpoints" / key
    folder.mkdir(parents=True, exist_ok=True)
    left = {n: size for n, size in files.items() if not _complete(folder / n, size)}
    require_space(folder, sum(left.values()), source.uri, "CKPTGATE_CACHE")
    for name, size in left.items():
        _copy(source, name, size, folder / name)
    return folder


def _complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy(source: Source, name: str, size: int, target: Path) -> None:
    """Copy a file; it gets its name when it is whole, so a later run resumes at the next file."""
    part = target.with_name(f".{name}.{os.getpid()}.part")
    buffer = np.empty(min(size, BLOCK), np.uint8)
    try:
        with part.open("wb") as handle:
            for start in range(0, size, BLOCK):
                block = buffer[: min(BLOCK, size - start)]
                source.read_into(name, start, block)
                handle.write(block.data)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
