# SPDX-License-Identifier: Apache-2.0
"""Ranges over HTTP: redirects, credentials, changed files and refusals, for the hub and for plain
web servers.

The client is httpx2's: proxies (``HTTPS_PROXY``, ``NO_PROXY``), certificates (``SSL_CERT_FILE``)
and ``~/.netrc`` work as everywhere. What a message names is the checkpoint's address, never the
URL of a redirect, which may carry a signature.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from verifier.checkpoint.remote import IN_FLIGHT, Interrupted, RemoteSource
from verifier.errors import (
    CkptgateError,
    MachineError,
    MissingExtra,
    ServerRefusedError,
    UsageError,
    WebPageError,
)

try:
    import httpx2
except ImportError as error:
    raise MissingExtra("a hub or web address", "hub") from error

T = TypeVar("T")
MAX_REDIRECTS = 5
MAX_JSON = 64 << 20
"""The most bytes of one answer of the hub's API."""
MAX_SKIP = 100_000_008
"""The most bytes before ranges that are read and dropped where a server ignores ranges: as many as
the largest header has."""
SLOWEST = 4096
"""Bytes per second below which a transfer is given up, once ``CKPTGATE_TIMEOUT`` has passed."""


def _without_query(record: logging.LogRecord) -> bool:
    """Cut the query, which may be a signature, off the URLs that httpx2 logs."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            a.copy_with(query=None) if isinstance(a, httpx2.URL) else a for a in record.args
        )
    return True


logging.getLogger("httpx2").addFilter(_without_query)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_LIMIT = re.compile(r";\s*t\s*=\s*(\d+)")


def timeout() -> float:
    """Return how many seconds a server may stay silent: ``CKPTGATE_TIMEOUT``, 30 by default.

    Raises:
        UsageError: the variable is not a positive number.
    """
    text = os.environ.get("CKPTGATE_TIMEOUT", "30")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise UsageError("CKPTGATE_TIMEOUT must be a positive number of seconds")
    return value


class HttpSource(RemoteSource):
    """Files of one directory by URL; subclasses implement `_url` and `files`."""

    def __init__(self, uri: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(uri)
        self._timeout = timeout()
        self._headers = {"accept-encoding": "identity", **(headers or {})}
        self._auth: httpx2.Auth | None = None
        self._client: httpx2.Client | None = None
        self._redirects: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._skipped = 0

    def _url(self, name: str) -> str:
        raise NotImplementedError

    def _refusal(self, status: int, headers: Mapping[str, str], label: str) -> CkptgateError:
        """Return the error for a status that no later try changes."""
        return refusal(status, label)

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return the file's ETag, or its time of change, once it was read."""
        known = self._versions.get(name)
        return (known,) if known else ()

    def close(self) -> None:
        """Drop what is held in memory and close the connections."""
        super().close()
        if self._client is not None:
            self._client.close()
            self._client = None

    def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
        headers = {"range": f"bytes={start}-{start + length - 1}"}
        label = self._label(name)
        try:
            with self._request("GET", self._url(name), label, headers) as response:
                self._check(name, response, start, length)
                skip = start if response.status_code == 200 else 0
                yield from self._body(response, skip, length, label)
        except ServerRefusedError as error:
            if name in self._sizes and error.status in (404, 410):
                raise MachineError(f"{label}: was listed and is gone now; run again") from None
            if name in self._sizes and error.status == 416:
                raise MachineError(
                    f"{label}: the server has fewer bytes than it listed (416): the file changed "
                    "while it was read; run again"
                ) from None
            raise

    def _check(self, name: str, response: httpx2.Response, start: int, length: int) -> None:
        """Check that an answer holds the range that was asked for, of the file that was listed.

        Raises:
            CkptgateError: it does not.
        """
        label = self._label(name)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise MachineError(f"{label}: the server compresses it; ranges cannot be read")
        self._require_unchanged(name, response, label)
        total = total_size(response)
        known = self._sizes.get(name)
        if known is not None and total is not None and total != known:
            raise MachineError(
                f"{label}: changed while it was read ({known:,} bytes, now {total:,}); run again"
            )
        if response.status_code == 200:
            self._skip(start, label)
            return
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != start or int(match[2]) > start + length - 1:
            got = response.headers.get("content-range", "no Content-Range")[:80]
            raise MachineError(
                f"{label}: the server answered a request for bytes {start}-{start + length - 1} "
                f"with {got!r}; a proxy on the way may be broken"
            )

    def _skip(self, start: int, label: str) -> None:
        """Allow a server that ignores ranges to send a file from its beginning, for headers.

        Raises:
            MachineError: too much would be fetched for nothing.
        """
        with self._lock:
            self._skipped += start
        if self._skipped > MAX_SKIP:
            raise MachineError(
                f"{label}: the server ignores range requests; only --depth header works there "
                "(download the checkpoint for more)"
            )

    def _require_unchanged(self, name: str, response: httpx2.Response, label: str) -> None:
        """Remember a file's ETag, or its time of change, and compare later answers with it."""
        tag = response.headers.get("etag") or response.headers.get("last-modified")
        if tag is None:
            return
        first = self._versions.setdefault(name, tag)
        if first != tag:
            raise MachineError(f"{label}: changed while it was read (its ETag changed); run again")

    def _body(
        self, response: httpx2.Response, skip: int, length: int, label: str
    ) -> Iterator[bytes]:
        """Yield ``length`` bytes of a body after ``skip``, and give up on a transfer that drips."""
        started, received = time.monotonic(), 0
        try:
            for chunk in response.iter_raw():
                received += len(chunk)
                self._count(nbytes=len(chunk))
                seconds = time.monotonic() - started
                if seconds > self._timeout and received < SLOWEST * seconds:
                    raise Interrupted(f"only {received:,} bytes came in {seconds:.0f} s")
                before = received - len(chunk)
                part = chunk[max(0, skip - before) : max(0, skip + length - before)]
                if part:
                    yield part
                if response.status_code == 206 and received > length:
                    raise MachineError(f"{label}: the server sent more bytes than asked for")
                # A connection is used again only if its answer was read to the end.
                if response.status_code == 200 and received >= skip + length:
                    break
        except httpx2.TransportError as error:
            raise Interrupted(_reason(error, self._timeout)) from None

    @contextmanager
    def _request(
        self, method: str, url: str, label: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Yield the final answer to a request, its body unread.

        Redirects are followed to https, or to the same host without leaving https; only the first
        host is sent credentials. Where a redirect leads is remembered for the next range.

        Raises:
            Interrupted: a later try may succeed.
            CkptgateError: the server refuses.
        """
        here = self._redirects.get(url, url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = {**self._headers, **(headers or {})}
            if _origin(here) != _origin(url):
                sent.pop("authorization", None)
            with self._send(method, here, sent) as response:
                if response.has_redirect_location:
                    here = _redirected(here, response.headers["location"], label)
                    continue
                if here != url and response.status_code in (401, 403, 410):
                    # A signed URL expires; the server that issued it issues another one.
                    if self._redirects.pop(url, None) is not None:
                        here = url
                        continue
                    raise Interrupted(f"the storage server refuses access ({response.status_code})")
                self._require_success(response, label)
                if here != url:
                    self._redirects[url] = here
                yield response
                return
        raise MachineError(f"{label}: more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        if self._client is None:
            self._client = httpx2.Client(
                auth=self._auth,
                follow_redirects=False,
                timeout=httpx2.Timeout(self._timeout, pool=None),
                limits=httpx2.Limits(max_connections=IN_FLIGHT),
            )
            weakref.finalize(self, self._client.close)
        self._count(requests=1)
        try:
            request = self._client.build_request(method, url, headers=headers)
            response = self._client.send(request, stream=True)
        except httpx2.TransportError as error:
            raise Interrupted(_reason(error, self._timeout)) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise MachineError(f"{self.uri}: {type(error).__name__}") from None
        try:
            yield response
        finally:
            response.close()

    def _require_success(self, response: httpx2.Response, label: str) -> None:
        status, headers = response.status_code, response.headers
        if status in (408, 429) or status >= 500:
            raise Interrupted(_overload(status), _wait(headers))
        if status not in (200, 206):
            raise self._refusal(status, headers, label) from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "text/html" and not label.endswith((".html", "/")):
            raise WebPageError(
                f"{label}: the server answered with a web page instead of the file; a login page "
                "or a captive portal may be in the way"
            )

    def _retried(self, label: str, fetch: Callable[[], T]) -> T:
        """Return what ``fetch`` returns, tried again as long as that may help."""
        failures = 0
        while True:
            try:
                return fetch()
            except Interrupted as error:
                failures += 1
                self._pause(failures, error, f"cannot read {label}")

    def _json(self, url: str, label: str) -> tuple[Any, str]:
        """Return an answer of the hub's API and the path of its next page ('' at the last one)."""

        def fetch() -> tuple[bytes, str]:
            with self._request("GET", url, label) as response:
                raw = b"".join(self._body(response, 0, MAX_JSON + 1, label))
                return raw, response.links.get("next", {}).get("url", "")

        raw, following = self._retried(label, fetch)
        if len(raw) > MAX_JSON:
            raise MachineError(f"{label}: the answer is larger than {MAX_JSON >> 20} MiB")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise MachineError(f"{label}: the answer is not JSON") from None
        return value, _path(following)


def _path(url: str) -> str:
    """Return path and query of a URL; a page may name another host, which is not asked."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def total_size(response: httpx2.Response) -> int | None:
    """Return the size of the whole file that an answer belongs to, None where it does not say."""
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        return int(match[3]) if match and match[3] != "*" else None
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else None


def refusal(status: int, label: str) -> CkptgateError:
    """Return the error for a status of a plain web server."""
    if status == 401:
        message = f"{label}: the server asks for a login (401); put user and password into ~/.netrc"
        return ServerRefusedError(message, status)
    if status == 403:
        return ServerRefusedError(f"{label}: access is denied (403)", status)
    if status in (404, 410):
        return ServerRefusedError(f"{label}: not found ({status})", status)
    if status == 416:
        return ServerRefusedError(
            f"{label}: ends before the bytes that were asked for (416)", status
        )
    return MachineError(f"{label}: the server answered {status}")


def _overload(status: int) -> str:
    if status == 429:
        return "too many requests (429); wait some minutes, or log in for a higher limit"
    if status == 408:
        return "the server timed out (408)"
    return f"the server failed ({status})"


def _wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: Retry-After, or the hub's RateLimit header."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    if text:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
    match = _LIMIT.search(headers.get("ratelimit", ""))
    return float(match[1][:9]) if match and "r=0" in headers.get("ratelimit", "") else None


def _reason(error: Exception, seconds: float) -> str:
    """Return what went wrong with a connection, without the error's text, which may hold URLs."""
    if isinstance(error, httpx2.ConnectError):
        return "no connection to the server"
    if isinstance(error, httpx2.ProxyError):
        return "the proxy refused the connection"
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {seconds:g} s"
    return "the connection broke"


def _origin(url: str) -> tuple[str, str]:
    parts: SplitResult = urlsplit(url)
    return parts.scheme, parts.netloc


def _redirected(url: str, location: str, label: str) -> str:
    """Return where a redirect leads.

    Raises:
        MachineError: to another scheme than https, on another host or away from https.
    """
    try:
        target = urljoin(url, location)
        before, after = urlsplit(url), urlsplit(target)
    except ValueError:
        raise MachineError(f"{label}: the server redirects to an invalid address") from None
    same = after.hostname == before.hostname and after.scheme == before.scheme
    if after.scheme != "https" and not same:
        where = f"{after.scheme}://{after.hostname or ''}"[:100]
        raise MachineError(f"{label}: the server redirects to {where}, which is not https; refused")
    return target
