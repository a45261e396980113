# SPDX-License-Identifier: Apache-2.0
"""A directory in an object store (``s3://``, ``gs://``), or behind any other fsspec address.

Credentials, endpoints and retries are those of s3fs and gcsfs. An object that is rewritten while
it is read stops the run: reads name its ETag (S3) or generation (GCS).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verifier.checkpoint.address import Address
from verifier.checkpoint.remote import RemoteSource
from verifier.errors import CkptgateError, MachineError, MissingExtra, UsageError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class StoreSource(RemoteSource):
    """The objects of a prefix, read by range requests."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.text)
        scheme = address.text.partition("://")[0].lower()
        try:
            import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415

            self._fs, self._root = fsspec.core.url_to_fs(address.text)
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            if extra is None:
                raise UsageError(f"{address.text}: {error}") from error
            raise MissingExtra(f"{scheme}://", extra) from error
        except ValueError as error:
            raise UsageError(f"{address.text}: unknown kind of address {scheme}://") from error
        self._scheme = EXTRAS.get(scheme, "")
        self._entries: dict[str, dict[str, Any]] = {}

    def files(self) -> dict[str, int]:
        """Return the size of every object directly under the prefix."""
        self._count(requests=1)
        try:
            self._fs.invalidate_cache()  # fsspec remembers listings for the whole process
            entries = self._fs.ls(self._root, detail=True)
        except Exception as error:
            raise self._failure(error, self.uri, "list") from error
        self._entries = {e["name"].rsplit("/", 1)[-1]: e for e in entries if e["type"] == "file"}
        return {name: int(e["size"]) for name, e in self._entries.items()}

    def version(self, name: str) -> tuple[str | int, ...]:
        """Return the object's generation or ETag, where the store has one."""
        entry = self._entries.get(name, {})
        tag = entry.get("generation") or entry.get("ETag") or entry.get("etag")
        return (str(tag),) if tag else ()

    def _stream(self, name: str, start: int, length: int) -> Iterator[bytes]:
        self._count(requests=1)
        try:
            data = self._get(name, start, start + length)
        except Exception as error:
            raise self._failure(error, self._label(name), "read") from error
        self._count(nbytes=len(data))
        if len(data) < length:
            raise MachineError(
                f"{self._label(name)}: {length - len(data):,} bytes are missing at byte "
                f"{start + len(data):,}"
            )
        yield data[:length]

    def _get(self, name: str, start: int, stop: int) -> bytes:
        path, version = f"{self._root}/{name}", self.version(name)
        if self._scheme == "s3" and version:
            return self._get_from_s3(path, start, stop, str(version[0]))
        options = {"generation": version[0]} if self._scheme == "gs" and version else {}
        data: bytes = self._fs.cat_file(path, start=start, end=stop, **options)
        return data

    def _get_from_s3(self, path: str, start: int, stop: int, etag: str) -> bytes:
        """Return a range of an object as long as it has an ETag."""
        from fsspec.asyn import sync  # type: ignore[import-untyped]  # noqa: PLC0415

        bucket, key, _ = self._fs.split_path(path)
        place = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}

        async def get() -> bytes:
            response = await self._fs._call_s3("get_object", **place, IfMatch=etag)
            async with response["Body"] as body:
                data: bytes = await body.read()
                return data

        result: bytes = sync(self._fs.loop, get)
        return result

    def _failure(self, error: Exception, label: str, action: str) -> CkptgateError:
        """Return what an fsspec error means; its text may name credentials, so only its kind and
        status are shown.
        """
        status = _status(error)
        absent = status == 404 or isinstance(error, FileNotFoundError)
        if status == 412 or (absent and action == "read"):
            return MachineError(f"{label}: changed while it was read; run again")
        if absent:
            return UsageError(f"{label}: not found")
        if status in (401, 403) or isinstance(error, PermissionError):
            return UsageError(
                f"{label}: access is denied; check the store's credentials and their permissions"
            )
        kind = type(error).__name__
        if kind in ("NoCredentialsError", "DefaultCredentialsError"):
            return UsageError(f"{label}: no credentials for {self._scheme}:// were found")
        return MachineError(f"cannot {action} {label}: {kind}{f' ({status})' if status else ''}")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of s3fs or gcsfs, None where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        code = metadata.get("HTTPStatusCode") or getattr(error, "code", None)
        if str(code).isdecimal():
            return int(str(code))
        error = error.__cause__ or error.__context__
    return None
