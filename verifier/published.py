# SPDX-License-Identifier: Apache-2.0
"""Compare the files at an address with a manifest: is what was published what was checked?

A file whose SHA-256 the hub knows (LFS and Xet files) is compared without a download. Small files
are read. A large file without a known digest is compared by size alone, unless everything is to be
read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import ValidationError

from verifier.checkpoint import Source, open_source
from verifier.errors import ContentError, UsageError
from verifier.manifest import MANIFEST, File, Manifest
from verifier.text import counted, printable, size

Status = Literal["equal", "different", "missing", "size only", "extra"]
STATUSES: tuple[Status, ...] = get_args(Status)
SMALL = 16 << 20
"""Files of at most this many bytes are read where no digest is known."""
BLOCK = 16 << 20
MAX_MANIFEST = 64 << 20


@dataclass(frozen=True, slots=True)
class FileComparison:
    """One file: ``detail`` is what differs, '' where nothing does."""

    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Published:
    """The comparison of all files of a manifest, and of weights that it does not list.

    Attributes:
        uri: the address.
        revision: the commit that was compared, '' where the address has none.
        files: by name.
        requests: sent over the network.
        nbytes: fetched over the network.
    """

    uri: str
    revision: str
    files: tuple[FileComparison, ...]
    requests: int
    nbytes: int

    def names(self, status: Status) -> list[str]:
        """Return the names of the files with one status."""
        return [f.name for f in self.files if f.status == status]

    @property
    def exit_code(self) -> int:
        """1 where a file differs, is missing or extra; 3 where one could not be compared; else
        0.
        """
        if any(self.names(s) for s in ("different", "missing", "extra")):
            return 1
        return 3 if self.names("size only") else 0


def read_manifest(file: str | os.PathLike[str]) -> Manifest:
    """Return the manifest in a local file.

    Raises:
        UsageError: no such file.
        ContentError: it is not a manifest, or lists no file.
    """
    path = Path(file)
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise ContentError(f"{path}: not a ckptgate manifest") from error
    if not manifest.files:
        raise ContentError(f"{path}: the manifest lists no file")
    return manifest


def compare_published(
    uri: str | os.PathLike[str], manifest: Manifest, *, read_all: bool = False
) -> Published:
    """Return how the files at an address compare with a manifest.

    Args:
        uri: the address of a checkpoint.
        manifest: with size and SHA-256 of every file.
        read_all: read large files too where no digest is known.

    Raises:
        UsageError: no such address.
        MachineError: reading failed.
    """
    source = open_source(uri)
    sizes, digests = source.files(), source.digests()
    files = [
        _compared(source, name, file, sizes.get(name), digests.get(name), read_all)
        for name, file in sorted(manifest.files.items())
    ]
    listed = {*manifest.files, MANIFEST}
    files += [
        FileComparison(name, "extra", "weights that the manifest does not list")
        for name in sorted(sizes)
        if name.endswith(".safetensors") and name not in listed
    ]
    requests, nbytes = source.traffic()
    return Published(source.uri, source.revision, tuple(files), requests, nbytes)


def _compared(
    source: Source, name: str, file: File, length: int | None, known: str | None, read_all: bool
) -> FileComparison:
    if length is None:
        return FileComparison(name, "missing")
    if length != file.bytes:
        return FileComparison(name, "different", f"{length:,} bytes, expected {file.bytes:,}")
    local = not source.remote
    if known is None and (local or read_all or length <= SMALL):
        known = _digest(source, name, length)
    if known is None:
        return FileComparison(name, "size only", f"{size(length)}, and no digest is known")
    if known != file.sha256:
        detail = f"sha256 {known[:12]}, expected {file.sha256[:12]}"
        return FileComparison(name, "different", detail)
    return FileComparison(name, "equal")


def _digest(source: Source, name: str, length: int) -> str:
    state = hashlib.sha256()
    buffer = np.empty(min(length, BLOCK), np.uint8)
    for start in range(0, length, BLOCK):
        block = buffer[: min(BLOCK, length - start)]
        source.read_into(name, start, block)
        state.update(block.data)
    return state.hexdigest()


def published_text(result: Published) -> str:
    """Return the comparison as lines of text: every file that is not equal, then the counts."""
    lines = [
        f"{f.status:9}  {printable(f.name)}{f'   {f.detail}' if f.detail else ''}"
        for f in result.files
        if f.status != "equal"
    ]
    counts = Counter(f.status for f in result.files)
    totals = ", ".join(f"{counts[s]:,} {s}" for s in STATUSES if counts[s])
    commit = f" at commit {result.revision}" if result.revision else ""
    lines.append(f"{counted(len(result.files), 'file')} of {result.uri}{commit}: {totals}")
    if result.requests:
        lines.append(f"remote: {size(result.nbytes)} in {counted(result.requests, 'request')}")
    return "\n".join(lines) + "\n"


def published_json(result: Published) -> str:
    """Return the comparison as one JSON document."""
    document = {
        "schema_version": "1.0",
        "uri": result.uri,
        "commit": result.revision or None,
        "files": [asdict(f) for f in result.files],
        "traffic": {"requests": result.requests, "bytes": result.nbytes},
    }
    return json.dumps(document, indent=2) + "\n"
