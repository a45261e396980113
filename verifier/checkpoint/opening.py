# SPDX-License-Identifier: Apache-2.0
"""Opens the source at an address: a local directory, the hub, a web server or an object store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verifier.checkpoint.address import Address, parse_address
from verifier.checkpoint.source import LocalSource, Source
from verifier.errors import UsageError

_opened: dict[Address, Source] | None = None


@contextmanager
def sources_kept() -> Iterator[dict[Address, Source]]:
    """Open each remote address once inside the block, and yield the sources by address.

    So every part of a command sees one commit, and headers are fetched once.
    """
    global _opened
    before, _opened = _opened, {}
    try:
        yield _opened
    finally:
        for source in _opened.values():
            source.close()
        _opened = before


def open_source(uri: str | os.PathLike[str]) -> Source:
    """Return the source at an address (`verifier.checkpoint.address`).

    Raises:
        UsageError: no such directory, repository or kind of address.
        MissingExtra: the address needs an extra that is not installed.
        MachineError: the hub cannot be reached.
    """
    address = parse_address(uri)
    if address.kind != "local":
        if _opened is None:
            return _open_remote(address)
        if address not in _opened:
            _opened[address] = _open_remote(address)
        return _opened[address]
    path = Path(address.text)
    if not path.exists():
        raise UsageError(f"{address.text}: no such directory")
    if not path.is_dir():
        raise UsageError(f"{address.text}: a file; give the directory that holds the checkpoint")
    return LocalSource(path)


def _open_remote(address: Address) -> Source:
    """Return the source of a remote address.

    Raises:
        UsageError: of a bare ``ORG/MODEL``, that it is not a directory either.
    """
    try:
        return _remote_source(address)
    except UsageError as error:
        if "://" in address.text:
            raise
        raise UsageError(f"{error}; there is no directory {address.text} here either") from error


def _remote_source(address: Address) -> Source:
    # Network libraries cost 100 ms and more, and are of no use to a local check.
    if address.kind == "hub":
        from verifier.checkpoint.hub import open_hub  # noqa: PLC0415

        return open_hub(address)
    if address.kind == "web":
        from verifier.checkpoint.web import WebSource  # noqa: PLC0415

        return WebSource(address)
    from verifier.checkpoint.store import StoreSource  # noqa: PLC0415

    return StoreSource(address)
