# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a checkpoint come from."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from verifier.errors import ContainerError, MachineError

Bytes = npt.NDArray[np.uint8]
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Traffic(NamedTuple):
    """What a source fetched over the network so far: requests (redirects included) and bytes of
    their bodies.
    """

    requests: int = 0
    nbytes: int = 0


class Source(Protocol):
    """A flat directory of files, read by range.

    Subclass it: the methods with a body are what a source without a network does.

    Attributes:
        uri: the address, without credentials.
        remote: whether a read crosses the network.
        escaping: names of links that lead out of the directory; they are not followed.
        revision: the commit that every read comes from, '' where the address has none.
    """

    uri: str
    remote: bool = False
    escaping: tuple[str, ...] = ()
    revision: str = ""

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every readable file, by name."""

    def read(self, name: str, offset: int, length: int) -> Bytes:
        """Return exactly ``length`` bytes of file ``name`` as uint8.

        Raises:
            ContainerError: the file ends before.
            MachineError: the read failed.
        """
        out = np.empty(length, np.uint8)
        self.read_into(name, offset, out)
        return out

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` (uint8, contiguous) with the bytes of file ``name`` from ``offset``; raises
        as `read` does.
        """
        out[:] = self.read(name, offset, out.size)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announce reads, as (file, offset, length) in the order in which they come.

        A remote source fetches neighbours together, several at a time, ahead of the reads.
        """
        return

    def checkpoint_directories(self) -> tuple[str, ...]:
        """Return the directories below this one that hold a checkpoint, as far as they are known
        without another request; relative, sorted.
        """
        return ()

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return what changes when file ``name`` is rewritten, as far as the source knows."""
        return ()

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of files whose digest is known without reading them, by name."""
        return {}

    def traffic(self) -> Traffic:
        """Return what was fetched over the network so far."""
        return Traffic()

    def close(self) -> None:
        """Close files and connections; a later read opens them again."""
        return


class _Open:
    """A file open for reading, closed when the last thread that reads it lets go of it."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalSource(Source):
    """A directory on this machine.

    A link that leads out of the directory is not followed, except the hub cache's own:
    ``snapshots/REV/FILE`` points into ``blobs/`` next to ``snapshots/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = str(path)
        in_hub_cache = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
        self.revision = path.name if in_hub_cache else ""
        self._files: dict[str, _Open] = {}
        self._lock = threading.Lock()

    def files(self) -> dict[str, int]:
        """Return the size of every regular file in the directory; links that lead outside go to
        ``escaping``.
        """
        root = self.path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        sizes: dict[str, int] = {}
        escaping: list[str] = []
        for entry in sorted(os.scandir(self.path), key=lambda e: e.name):
            if entry.is_symlink():
                try:
                    target = Path(entry.path).resolve()
                except (OSError, RuntimeError):  # a link to itself: RuntimeError before Python 3.13
                    escaping.append(entry.name)
                    continue
                if not any(target.is_relative_to(a) for a in allowed):
                    escaping.append(entry.name)
                    continue
            try:
                info = entry.stat()
            except OSError:
                continue  # a dangling link is an absent file; the index rule names it
            if stat.S_ISREG(info.st_mode):
                sizes[entry.name] = info.st_size
        self.escaping = tuple(escaping)
        return sizes

    def checkpoint_directories(self) -> tuple[str, ...]:
        """Return the directories up to two levels below that hold ``*.safetensors``; the hub cache
        has ``snapshots/REV`` there.
        """
        found = {
            file.parent.relative_to(self.path).as_posix()
            for pattern in ("*/*.safetensors", "*/*/*.safetensors")
            for file in self.path.glob(pattern)
        }
        return tuple(sorted(found))

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes of ``name`` from ``offset``."""
        view, length, done = out.data, out.size, 0
        try:
            file = self._file(name)
            while done < length:
                got = os.preadv(file.fd, [view[done:] if done else view], offset + done)
                if got == 0:
                    raise ContainerError(
                        f"{name}: ends at byte {offset + done:,}; "
                        f"{length - done:,} bytes are missing"
                    )
                done += got
        except OSError as error:
            raise MachineError(
                f"cannot read {self.path / name}: {error.strerror or error}"
            ) from error

    def _file(self, name: str) -> _Open:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                if len(self._files) >= 64:
                    del self._files[next(iter(self._files))]
                file = self._files[name] = _Open(self.path / name)
            return file

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return the time of the last change in nanoseconds, and the inode."""
        info = os.stat(self.path / name)
        return info.st_mtime_ns, info.st_ino

    def close(self) -> None:
        """Close every file that reads opened."""
        with self._lock:
            self._files.clear()


class DerivedSource(Source):
    """Another source's files under a different reading of them; subclasses override `read`."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self.uri, self.remote, self.escaping = inner.uri, inner.remote, inner.escaping
        self.revision = inner.revision

    def files(self) -> dict[str, int]:
        """Return the files of the inner source."""
        return self.inner.files()

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announce reads to the inner source."""
        self.inner.expect(ranges)

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return the inner source's version of a file."""
        return self.inner.version(name)

    def digests(self) -> dict[str, str]:
        """Return the digests that the inner source knows."""
        return self.inner.digests()

    def traffic(self) -> Traffic:
        """Return what the inner source fetched."""
        return self.inner.traffic()

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()
