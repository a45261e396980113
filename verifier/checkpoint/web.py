# SPDX-License-Identifier: Apache-2.0
"""A directory on a plain web server (``https://``), with or without a listing.

The index names the shards, and known names the other files; a listing adds the rest. The first
request for a shard returns its size with its header, so that no shard costs a request of its own
for the size.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from typing import TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpx2
import numpy as np

from verifier.checkpoint.address import Address
from verifier.checkpoint.header import MAX_HEADER, strict_json
from verifier.checkpoint.http import HttpSource, total_size
from verifier.checkpoint.index import FIRST_GUESS, INDEX, header_guesses, plain_name
from verifier.checkpoint.remote import Interrupted
from verifier.checkpoint.source import Bytes
from verifier.errors import (
    ContainerError,
    MachineError,
    ServerRefusedError,
    UsageError,
    WebPageError,
)

T = TypeVar("T")
SINGLE = "model.safetensors"
PROBED = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "ckptgate_manifest.json",
)
"""Files that are looked for where the server lists none."""
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
MAX_LISTING = 4 << 20
MAX_INDEX = MAX_HEADER
ABSENT = (403, 404, 405, 410, 501)
MAX_FILES = 10_000


class WebSource(HttpSource):
    """The files of a web directory."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.text)
        self._auth = _netrc()
        self._heads: dict[str, Bytes] = {}

    def _url(self, name: str) -> str:
        return f"{self.uri}/{quote(name)}"

    def files(self) -> dict[str, int]:
        """Return the size of every file that the index, a known name or a listing leads to."""
        if not self._sizes:
            self._sizes = self._discovered()
        return dict(self._sizes)

    def _discovered(self) -> dict[str, int]:
        listed, index = self._listing(), self._index()
        shards = {f for f in index.values() if plain_name(f)}
        shards |= {n for n in listed if n.endswith(".safetensors")}
        if not shards:
            shards = {SINGLE}
        if len(shards) > MAX_FILES:
            raise ContainerError(f"{self.uri}: the index names more than {MAX_FILES:,} shards")
        others = (listed or set(PROBED)) - shards - {INDEX}
        guesses = header_guesses(index)

        def size_of(name: str) -> int | None:
            if name in shards:
                return self._head(name, 8 + guesses.get(name, FIRST_GUESS))
            return self._size(name)

        names = sorted(shards | others)
        sizes = dict(zip(names, self._all(names, size_of), strict=True))
        if INDEX in self._heads:
            sizes[INDEX] = self._heads[INDEX].size
        elif not any(sizes[n] is not None for n in shards):
            raise UsageError(
                f"{self.uri}: neither {INDEX} nor {SINGLE} is there; give the URL of the "
                "directory that holds them"
            )
        return {n: size for n, size in sizes.items() if size is not None}

    def _index(self) -> dict[str, str]:
        """Fetch the index, and return the shard of each tensor as far as it can be read."""
        raw = self._present(INDEX, lambda: self._fetch_all(INDEX))
        if raw is None:
            return {}
        self._heads[INDEX] = np.frombuffer(raw, np.uint8)
        try:
            value = strict_json(raw)
        except ValueError:
            return {}  # QC102 reports it
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        items = weight_map.items() if isinstance(weight_map, dict) else ()
        return {k: v for k, v in items if isinstance(v, str) and plain_name(v)}

    def read_into(self, name: str, offset: int, out: Bytes) -> None:
        """Fill ``out``, from what `files` fetched where that holds it."""
        head = self._heads.get(name)
        end = min(offset + out.size, head.size) if head is not None else 0
        if head is not None and end > offset:
            out[: end - offset] = head[offset:end]
            out, offset = out[end - offset :], end
        if out.size:
            super().read_into(name, offset, out)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Fetch ranges ahead of their reads, except what `files` fetched."""
        left = []
        for name, offset, length in ranges:
            held = self._heads[name].size if name in self._heads else 0
            start = max(offset, held)
            if offset + length > start:
                left.append((name, start, offset + length - start))
        super().expect(left)

    def _listing(self) -> set[str]:
        """Return the file names on the directory's page; none where that shows no shard."""
        page = self._present("", self._fetch_page)
        if not page:
            return set()
        parser = _Links()
        parser.feed(page.decode("utf-8", "replace"))
        names = {n for n in map(self._linked_name, parser.links) if n.endswith(SUFFIXES)}
        if len(names) > MAX_FILES:
            raise MachineError(f"{self.uri}: more than {MAX_FILES:,} files in one directory")
        return names if any(n.endswith(".safetensors") for n in names) else set()

    def _fetch_page(self) -> bytes:
        label = self._label("")
        with self._request("GET", label, label) as response:
            if not response.headers.get("content-type", "").startswith("text/html"):
                return b""
            return b"".join(self._body(response, 0, MAX_LISTING, label))

    def _fetch_all(self, name: str) -> bytes:
        label = self._label(name)
        with self._request("GET", self._url(name), label) as response:
            size = total_size(response)
            if size is not None and size > MAX_INDEX:
                raise ContainerError(
                    f"{label}: {size:,} bytes, more than the {MAX_INDEX:,} allowed"
                )
            self._require_unchanged(name, response, label)
            raw = b"".join(self._body(response, 0, MAX_INDEX, label))
        if size is not None and len(raw) != size:
            raise Interrupted(f"the connection ended after {len(raw):,} of {size:,} bytes")
        return raw

    def _head(self, name: str, length: int) -> int | None:
        """Fetch the first bytes of a file and return its size; None where it is not there."""
        label = self._label(name)

        def fetch() -> tuple[int, bytes]:
            headers = {"range": f"bytes=0-{length - 1}"}
            with self._request("GET", self._url(name), label, headers) as response:
                self._check(name, response, 0, length)
                size = total_size(response)
                if size is None:
                    raise MachineError(f"{label}: the server does not send its size")
                head = b"".join(self._body(response, 0, min(length, size), label))
            if len(head) < min(length, size):
                raise Interrupted(f"the connection ended after {len(head):,} bytes")
            return size, head

        size_and_head = self._present(name, fetch)
        if size_and_head is None:
            return None
        size, head = size_and_head
        self._heads[name] = np.frombuffer(head, np.uint8)
        return size

    def _size(self, name: str) -> int | None:
        """Return the size of a file; None where it is not there, or its size is not known."""

        def fetch() -> int | None:
            with self._request("HEAD", self._url(name), self._label(name)) as response:
                return total_size(response)

        try:
            return self._present(name, fetch)
        except WebPageError:  # some servers have a page for every address
            return None

    def _linked_name(self, link: str) -> str:
        """Return the plain file name that a link of a listing means, '' where it leads
        elsewhere.
        """
        base = f"{self.uri}/"
        try:
            target = urlsplit(urljoin(base, link))
        except ValueError:
            return ""
        name = unquote(target._replace(query="", fragment="").geturl().removeprefix(base))
        return name if plain_name(name) else ""

    def _present(self, name: str, fetch: Callable[[], T]) -> T | None:
        """Return what ``fetch`` returns; None where the file is absent.

        Object stores answer 403 for a file that is absent where they list none.
        """
        try:
            return self._retried(self._label(name), fetch)
        except ServerRefusedError as error:
            if error.status in ABSENT:
                return None
            raise


def _netrc() -> httpx2.Auth | None:
    """Return the logins of ``~/.netrc`` or ``NETRC``; None without such a file.

    Raises:
        UsageError: the file cannot be read.
    """
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    if not os.path.isfile(file):
        return None
    try:
        return httpx2.NetRCAuth(file)
    except (netrc.NetrcParseError, OSError):
        raise UsageError(f"{file}: cannot be read as a netrc file") from None


class _Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the target of a link."""
        self.links += [v for k, v in attrs if tag == "a" and k == "href" and v]
