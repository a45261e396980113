# SPDX-License-Identifier: Apache-2.0
"""Addresses of checkpoints: a local directory, a hub repository, a web directory, an object store.

Every command that takes a checkpoint parses its argument here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from verifier.errors import UsageError

Kind = Literal["local", "hub", "web", "store"]
DEFAULT_ENDPOINT = "https://huggingface.co"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/[a-z]+/[\w.-]+|[^/@\s]+))?"
    r"(?:/(?P<directory>.*))?"
)
_CREDENTIALS = re.compile(r"[^/]*:[^/]*@")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?:::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a checkpoint is.

    Attributes:
        kind: ``local``, ``hub``, ``web`` (http and https) or ``store`` (every other fsspec scheme).
        text: the address as reports and messages show it.
        repo: ``org/model`` on the hub.
        revision: branch, tag or commit on the hub, '' for ``main``.
        directory: path inside the repository, without slashes at its ends.
    """

    kind: Kind
    text: str
    repo: str = ""
    revision: str = ""
    directory: str = ""


def endpoint() -> str:
    """Return the hub's address, as huggingface_hub takes it from ``HF_ENDPOINT``."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether an address is a path on this machine."""
    return parse_address(uri).kind == "local"


def parse_address(uri: str | os.PathLike[str]) -> Address:
    """Return the parsed address; nothing is contacted.

    A bare ``org/model`` is a hub repository where neither that path nor the directory ``org``
    exists here.

    Raises:
        UsageError: an address that is malformed, or that carries credentials.
    """
    text = os.fspath(uri)
    match = _SCHEME.match(text)
    if match is None:
        return _hub(text, text) if _bare_repository(uri, text) else Address("local", text)
    scheme, rest = match[0][:-3].lower(), text[match.end() :]
    if scheme == "hf":
        return _hub(text, rest)
    if scheme in ("http", "https"):
        return _web(text)
    if not rest.strip("/") or _CREDENTIALS.match(rest):
        raise UsageError(f"{scheme}:// needs a bucket and a directory, and no credentials")
    return Address("store", text.rstrip("/"))


def _bare_repository(uri: str | os.PathLike[str], text: str) -> bool:
    """Whether a text without a scheme can only mean a hub repository."""
    match = _HUB.fullmatch(text)
    return (
        isinstance(uri, str)
        and match is not None
        and not match["directory"]
        and not os.path.lexists(text)
        and not Path(text).parent.exists()
    )


def _hub(text: str, rest: str) -> Address:
    first = rest.split("/")[0]
    if first in ("datasets", "spaces", "buckets", "kernels"):
        raise UsageError(f"{text}: {first} hold no checkpoint; use hf://ORG/MODEL")
    match = _HUB.fullmatch(rest.removeprefix("models/").rstrip("/"))
    if match is None:
        raise UsageError(f"{text}: not a hub address; use hf://ORG/MODEL[@REVISION][/DIRECTORY]")
    directory = (match["directory"] or "").strip("/")
    if directory and not _plain_path(directory):
        raise UsageError(f"{text}: the directory must be a plain path inside the repository")
    revision = unquote(match["revision"] or "")
    if revision and not _plain_path(revision):
        raise UsageError(f"{text}: not a revision; use a branch, tag or commit")
    return Address("hub", text, match["repo"], revision, directory)


def _plain_path(path: str) -> bool:
    return not any(part in ("", ".", "..") for part in path.split("/"))


def _web(text: str) -> Address:
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError as error:
        raise UsageError(f"{text[:200]}: not a URL") from error
    if parts.username or parts.password or "@" in parts.netloc:
        raise UsageError(
            f"the address of {host or 'HOST'} holds a user name or password; put them in ~/.netrc"
        )
    if not host:
        raise UsageError(f"{text}: the host is missing")
    if parts.query or parts.fragment:
        directory = f"{parts.scheme}://{parts.netloc}{parts.path}"
        raise UsageError(f"{directory}: give the directory's URL without '?' and '#'")
    if parts.netloc == urlsplit(endpoint()).netloc:
        return _hub_page(text, parts.path.strip("/"))
    return Address("web", text.rstrip("/"))


def _hub_page(text: str, path: str) -> Address:
    """Return the repository that a page of the hub's web site shows."""
    org, _, rest = path.partition("/")
    name, _, page = rest.partition("/")
    if not page:
        return _hub(text, f"{org}/{name}")
    kind, _, at = page.partition("/")
    if kind not in ("tree", "resolve") or not at:
        raise UsageError(f"{text}: use the repository's address, hf://{org}/{name}")
    return _hub(text, f"{org}/{name}@{at}")
