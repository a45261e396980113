# SPDX-License-Identifier: Apache-2.0
"""A repository on the Hugging Face Hub, or on a server with the same API (``HF_ENDPOINT``).

Endpoint, token, cache and offline mode are huggingface_hub's. The revision is resolved to a commit
once; every file is read at that commit, from the hub cache where its blob is there.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from verifier import __version__
from verifier.checkpoint.address import Address, endpoint
from verifier.checkpoint.http import HttpSource, refusal
from verifier.checkpoint.source import Bytes, LocalSource, Source
from verifier.errors import (
    CkptgateError,
    MachineError,
    MissingExtra,
    ServerRefusedError,
    UsageError,
)
from verifier.files import require_space

try:
    from huggingface_hub import constants, get_token, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import repo_folder_name
except ImportError as error:
    raise MissingExtra("a hub address", "hub") from error

MAX_PAGES = 200
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it; ``sha256`` is that of the contents where the hub has it (LFS and
    Xet files), ``blob`` the name of its blob in the hub cache.
    """

    name: str
    size: int
    sha256: str | None
    blob: str


def open_hub(address: Address) -> Source:
    """Return the source of a repository; in offline mode its snapshot in the hub cache.

    Raises:
        UsageError: offline, and the cache holds no snapshot of the revision.
    """
    if not constants.is_offline_mode():
        return HubSource(address)
    revision = address.revision or "main"
    folder = _cache_folder(address.repo)
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit / address.directory
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise UsageError(
            f"{address.text}: HF_HUB_OFFLINE is set, and the hub cache holds no snapshot of "
            f"revision {revision}"
        )
    source = LocalSource(snapshot)
    source.uri, source.revision = address.text, commit
    return source


def _cache_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


class HubSource(HttpSource):
    """A repository's files at one commit."""

    def __init__(self, address: Address) -> None:
        # Not `build_hf_headers`: it asks the hub for a list of agents first.
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        headers = {"user-agent": f"ckptgate/{__version__}"}
        super().__init__(
            address.text, headers | ({"authorization": f"Bearer {token}"} if token else {})
        )
        self.address = address
        self._has_token = token is not None
        self._entries: dict[str, HubFile] = {}
        self._blobs = LocalSource(_cache_folder(address.repo) / "blobs")
        self._cached: dict[str, str] = {}
        self.revision = self._resolve()

    def _resolve(self) -> str:
        """Return the commit of the revision."""
        revision = quote(self.address.revision or "main", safe="")
        value, _ = self._json(f"{self._api}/revision/{revision}", self.uri)
        commit = value.get("sha") if isinstance(value, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise MachineError(f"{self.uri}: the hub's answer names no commit")
        return commit

    @property
    def _api(self) -> str:
        return f"{endpoint()}/api/models/{self.address.repo}"

    def files(self) -> dict[str, int]:
        """Return the size of every file in the directory."""
        if not self._entries:
            self._entries = {e.name: e for e in self._listed()}
            self._sizes = {e.name: e.size for e in self._entries.values()}
            for entry in self._entries.values():
                blob = self._blobs.path / entry.blob
                if blob.is_file() and blob.stat().st_size == entry.size:
                    self._cached[entry.name] = entry.blob
        return dict(self._sizes)

    def entries(self) -> Mapping[str, HubFile]:
        """Return the files of the directory as the hub lists them, by name."""
        self.files()
        return self._entries

    def _listed(self) -> Iterator[HubFile]:
        directory = self.address.directory
        path = f"/{quote(directory)}" if directory else ""
        url = f"{self._api}/tree/{self.revision}{path}"
        for _ in range(MAX_PAGES):
            page, following = self._json(url, f"{self.uri}/")
            if not isinstance(page, list):
                raise MachineError(f"{self.uri}: the hub's listing is not an array")
            entries = (_entry(item, directory) for item in page)
            yield from (e for e in entries if e is not None)
            if not following:
                return
            url = urljoin(endpoint(), following)
        raise MachineError(f"{self.uri}: the directory has more than {MAX_PAGES:,} pages of files")

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every LFS and Xet file, as the hub has it."""
        return {n: e.sha256 for n, e in self.entries().items() if e.sha256}

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` from the hub cache where the file is there, else over the network."""
        if name in self._cached:
            self._blobs.read_into(self._cached[name], offset, out)
        else:
            super().read_into(name, offset, out)

    def expect(self, ranges: Any) -> None:
        """Fetch ranges ahead of their reads, except those of files in the hub cache."""
        super().expect(r for r in ranges if r[0] not in self._cached)

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return the hub's digest of the file."""
        entry = self._entries.get(name)
        return (entry.sha256 or entry.blob,) if entry else ()

    def _url(self, name: str) -> str:
        path = f"{self.address.directory}/{name}" if self.address.directory else name
        return hf_hub_url(self.address.repo, path, revision=self.revision, endpoint=endpoint())

    def _refusal(self, status: int, headers: Mapping[str, str], label: str) -> CkptgateError:
        code = headers.get("x-error-code", "")
        reason = self._reason(status, code, label)
        return (
            ServerRefusedError(f"{self.uri}: {reason}", status)
            if reason
            else refusal(status, label)
        )

    def _reason(self, status: int, code: str, label: str) -> str:
        """Return what the hub means by a status, '' where it means what any server does."""
        repo, revision = self.address.repo, self.address.revision or "main"
        if status == 401 and self._has_token:
            return (
                "the hub does not accept the token (401); log in again with `hf auth login`, or "
                "set HF_TOKEN"
            )
        if status == 401:
            return (
                "the hub refuses access without a token (401): the repository is private, or does "
                "not exist; log in with `hf auth login`, or set HF_TOKEN"
            )
        if status == 403 and code == "GatedRepo":
            return f"the repository is gated (403); accept its terms at {endpoint()}/{repo}"
        if status == 403:
            return "the token may not read this repository (403); use one with read access"
        if status == 404 and code == "RevisionNotFound":
            return f"the repository has no revision {revision} (404)"
        if status == 404 and not self.revision:
            return f"the hub has no repository {repo} (404)"
        if status == 404 and label.endswith("/"):
            return f"the repository has no directory {self.address.directory} (404)"
        return ""


def download(source: HubSource) -> str:
    """Download a repository's directory into the hub cache and return its local path.

    Raises:
        MachineError: it does not fit on the disk, or the download fails.
    """
    address, cache = source.address, Path(constants.HF_HUB_CACHE)
    sizes = source.files()
    cache.mkdir(parents=True, exist_ok=True)
    missing = sum(size for name, size in sizes.items() if name not in source._cached)
    require_space(cache, missing, source.uri, "HF_HOME")
    prefix = f"{address.directory}/" if address.directory else ""
    try:
        # By name, not by commit: so the cache knows the name in offline mode.
        snapshot = snapshot_download(
            address.repo,
            revision=address.revision or None,
            endpoint=endpoint(),
            allow_patterns=[f"{prefix}{glob.escape(name)}" for name in sizes],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        # The error's text may hold signed URLs.
        status = getattr(getattr(error, "response", None), "status_code", "")
        reason = f"{type(error).__name__}{f' {status}' if status else ''}"
        raise MachineError(f"{source.uri}: the download failed ({reason})") from None
    if Path(snapshot).name != source.revision:
        raise MachineError(f"{source.uri}: the revision moved during the download; run again")
    return str(Path(snapshot) / address.directory)


def _entry(item: Any, directory: str) -> HubFile | None:
    """Return a file of a listing; None for directories and for entries that name no plain file."""
    if not isinstance(item, dict) or item.get("type") != "file":
        return None
    path, size = item.get("path"), item.get("size")
    if not isinstance(path, str) or type(size) is not int or not 0 <= size < 1 << 50:
        return None
    name = path.removeprefix(f"{directory}/") if directory else path
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        return None
    lfs = item.get("lfs")
    oid = lfs.get("oid") if isinstance(lfs, dict) else None
    sha256 = oid if isinstance(oid, str) and re.fullmatch(r"[0-9a-f]{64}", oid) else None
    blob = sha256 or item.get("oid")
    valid = isinstance(blob, str) and _OID.fullmatch(blob)
    return HubFile(name, size, sha256, str(blob) if valid else "")
