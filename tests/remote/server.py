# SPDX-License-Identifier: Apache-2.0
"""A process that serves a directory on loopback, as a web server or in the shape of the hub.

    python -m tests.remote.server ROOT [--no-ranges] [--listing] [--hub] [--delay S] [--log FILE]

It prints one JSON line with its ports, and ends with its standard input. Every request is appended
to the log as a JSON line. ``ROOT/.faults.json`` is read at each request; keys are file names:

    {"model.safetensors": {"reset": 100, "times": 1}}    cut the connection after 100 bytes
    {... {"short": 100}}        end the body early, with the length that it really has
    {... {"content_range": "bytes 5-9/10"}}              a wrong Content-Range
    {... {"drip": 0.2}}         one byte each 0.2 s
    {... {"status": 429, "headers": {"Retry-After": "1"}}}
    {... {"html": true}}        a captive portal
    {... {"etag": "changes"}}   another ETag at each request
    {... {"location": "http://example.org/x"}}           a redirect
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
SIGNATURE = "signed-0123456789"
LFS_SUFFIXES = (".safetensors",)
BLOCK = 1 << 20


class State:
    """What all connections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.root = Path(options.root)
        self.lock = threading.Lock()
        self.idle = threading.Condition()
        self.active = 0
        self.seen: dict[str, int] = {}
        self.cdn = 0
        self.digests: dict[str, str] = {}

    def fault(self, name: str) -> dict[str, Any]:
        """Return the fault that is set for a file, as long as it is to happen."""
        file = self.root / ".faults.json"
        found = json.loads(file.read_text()).get(name, {}) if file.exists() else {}
        with self.lock:
            key = f"{name} {json.dumps(found)}"
            self.seen[key] = self.seen.get(key, 0) + 1
            return found if self.seen[key] <= found.get("times", 1 << 30) else {}

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file; of sparse giants one made up from its name and size."""
        info = path.stat()
        key = f"{path} {info.st_size} {info.st_mtime_ns}"
        with self.lock:
            if key not in self.digests:
                raw = key.encode() if info.st_size > 64 << 20 else path.read_bytes()
                self.digests[key] = hashlib.sha256(raw).hexdigest()
            return self.digests[key]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: State
    cdn = False
    sent = 0

    def log_message(self, *_args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer a request and log it; ``/_idle`` is answered when every other one is logged."""
        if self.path == "/_idle":
            with self.state.idle:
                self.state.idle.wait_for(lambda: not self.state.active, timeout=10)
            self.reply(200, b"")
            return
        with self.state.idle:
            self.state.active += 1
        try:
            self.logged_answer()
        finally:
            with self.state.idle:
                self.state.active -= 1
                self.state.idle.notify_all()

    def logged_answer(self) -> None:
        time.sleep(self.state.options.delay)
        self.sent, self.status = 0, 0
        try:
            self.route(unquote(urlsplit(self.path).path))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        entry = {
            "method": self.command,
            "path": self.path,
            "range": self.headers.get("range"),
            "status": self.status,
            "bytes": self.sent,
            "authorization": self.headers.get("authorization"),
            "cdn": self.cdn,
        }
        if self.state.options.log:
            line = json.dumps(entry) + "\n"
            with self.state.lock, open(self.state.options.log, "a") as handle:
                handle.write(line)

    def route(self, path: str) -> None:
        if self.cdn:
            self.from_cdn(path)
        elif self.state.options.gcs:
            self.store(path.strip("/").split("/"))
        elif self.state.options.hub:
            self.hub(path.strip("/").split("/"))
        else:
            self.plain(path)

    def plain(self, path: str) -> None:
        file = self.state.root / path.lstrip("/")
        name = file.name
        fault = self.state.fault(name)
        if self.faulty(fault):
            return
        if file.is_dir():
            self.listing(file)
        elif not file.is_file() or name.startswith("."):
            self.reply(404, b"not found")
        else:
            self.file(file, fault)

    def listing(self, folder: Path) -> None:
        if self.state.options.pages and (folder / "index.html").exists():
            raw = (folder / "index.html").read_bytes()
            self.reply(200, raw, {"Content-Type": "text/html"})
            return
        if not self.state.options.listing:
            self.reply(403, b"no listing")
            return
        links = "".join(f'<a href="{n}">{n}</a>\n' for n in sorted(os.listdir(folder)))
        self.reply(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"})

    # Google Cloud Storage: the JSON API's list and download, for directories as buckets

    def store(self, parts: list[str]) -> None:
        query = parse_qs(urlsplit(self.path).query)
        download = parts[0] == "download"
        if download:
            parts = parts[1:]
        bucket, name = self.state.root / parts[3], "/".join(parts[5:])
        file = bucket / name
        if not bucket.is_dir() or (name and not file.is_file()):
            self.json({"error": {"message": "not found"}}, status=404)
        elif name and download:
            if query.get("generation", [_generation(file)]) != [_generation(file)]:
                self.json({"error": {"message": "no such generation"}}, status=404)
            else:
                self.file(file, {})
        else:
            prefix = query.get("prefix", [""])[0]
            files = [p for p in sorted((bucket / prefix).glob("*")) if p.is_file()]
            items = [_resource(bucket, p) for p in files]
            self.json(_resource(bucket, file) if name else {"items": items})

    # the hub

    def hub(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if self.faulty(self.state.fault(repo)) or not self.allowed(repo):
            return
        folder = self.state.root / repo
        if not folder.is_dir():
            code = 404 if self.headers.get("authorization") else 401
            self.reply(code, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and rest[:1] == ["revision"]:
            if "/".join(rest[1:]) in ("main", "v1.0", COMMIT, "refs/pr/1"):
                names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
                files = [{"rfilename": name} for name in names]
                self.json({"id": repo, "sha": COMMIT, "siblings": files})
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif parts[0] == "api" and rest[:2] == ["tree", COMMIT]:
            self.tree(folder, "/".join(rest[2:]))
        elif rest[:2] == ["resolve", COMMIT]:
            self.resolve(folder, "/".join(rest[2:]))
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def allowed(self, repo: str) -> bool:
        """Whether the token may read a repository: those named private or gated ask for one."""
        sent = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if "private" in repo and sent != self.state.options.token:
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return False
        if "gated" in repo:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return False
        if "forbidden" in repo:
            self.reply(403, b"{}")
            return False
        return True

    def tree(self, folder: Path, directory: str) -> None:
        if not (folder / directory).is_dir():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        entries = []
        for path in sorted((folder / directory).iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
                continue
            size = path.stat().st_size
            entry = {"type": "file", "path": name, "size": size, "oid": _git_blob(path)}
            if path.suffix in LFS_SUFFIXES:
                digest = self.state.digest(path)
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            entries.append(entry)
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        page = entries[start : start + self.state.options.page]
        if self.state.options.circle:
            start, page = -len(page), page
        headers = {}
        if start + len(page) < len(entries):
            # As from behind a mirror: the link names the host that the mirror stands for.
            base = f"https://huggingface.co{urlsplit(self.path).path}"
            headers["Link"] = f'<{base}?cursor={start + len(page)}>; rel="next"'
        self.json(page, headers)

    def resolve(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif path.suffix in LFS_SUFFIXES:
            fault = self.state.fault(f"resolve {path.name}")
            if self.faulty(fault):
                return
            where = path.relative_to(self.state.root)
            location = f"http://127.0.0.1:{self.state.cdn}/{where}?X-Signature={SIGNATURE}"
            linked = {
                "Location": location,
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(path.stat().st_size),
                "X-Linked-Etag": f'"{self.state.digest(path)}"',
            }
            self.reply(302, b"", linked)
        else:
            fault = self.state.fault(path.name)
            if not self.faulty(fault):
                self.file(path, fault)

    def from_cdn(self, path: str) -> None:
        if self.headers.get("authorization"):
            self.reply(400, b"credentials on the CDN")
            return
        if parse_qs(urlsplit(self.path).query).get("X-Signature") != [SIGNATURE]:
            self.reply(403, b"expired")
            return
        file = self.state.root / path.lstrip("/")
        fault = self.state.fault(file.name)
        if not self.faulty(fault):
            self.file(file, fault)

    # answers

    def json(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        kind = {"Content-Type": "application/json"}
        self.reply(status, json.dumps(value).encode(), kind | (headers or {}))

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.sent += len(body)

    def faulty(self, fault: dict[str, Any]) -> bool:
        """Answer with a fault that needs no file; return whether that was done."""
        if "status" in fault:
            self.reply(fault["status"], b"fault", fault.get("headers"))
        elif "html" in fault:
            self.reply(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        elif "location" in fault:
            self.reply(302, b"", {"Location": fault["location"]})
        else:
            return False
        return True

    def file(self, path: Path, fault: dict[str, Any]) -> None:
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        asked = self.headers.get("range")
        if asked and not self.state.options.no_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last or size) + 1), 206
            if start >= size:
                self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        self.status = status
        self.send_response(status)
        tag = str(time.monotonic_ns()) if "etag" in fault else self.state.digest(path)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Type", "application/octet-stream")
        if self.state.options.hub:
            self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            known = fault.get("content_range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Range", known)
        length = min(fault.get("short", stop - start), stop - start)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "GET":
            self.body(path, start, start + length, fault)

    def body(self, path: Path, start: int, stop: int, fault: dict[str, Any]) -> None:
        step = 1 if "drip" in fault else BLOCK
        limit = start + fault.get("reset", stop - start)
        with path.open("rb") as handle:
            handle.seek(start)
            position = start
            while position < min(stop, limit):
                data = handle.read(min(step, stop - position, limit - position))
                self.wfile.write(data)
                self.sent += len(data)
                position += len(data)
                time.sleep(fault.get("drip", 0))
        if position < stop:  # the connection breaks
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True


def _generation(path: Path) -> str:
    return str(path.stat().st_mtime_ns)


def _resource(bucket: Path, path: Path) -> dict[str, str]:
    """Return an object as Google Cloud Storage describes it."""
    return {
        "kind": "storage#object",
        "name": str(path.relative_to(bucket)),
        "bucket": bucket.name,
        "size": str(path.stat().st_size),
        "generation": _generation(path),
    }


def _git_blob(path: Path) -> str:
    """Return the name that git gives a file's contents; of giants one made up from the name."""
    if path.stat().st_size > 64 << 20:
        return hashlib.sha1(path.name.encode(), usedforsecurity=False).hexdigest()
    raw = path.read_bytes()
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + raw, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a client goes away."""


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--hub", action="store_true")
    parser.add_argument("--gcs", action="store_true")
    parser.add_argument("--no-ranges", action="store_true")
    parser.add_argument("--listing", action="store_true")
    parser.add_argument("--circle", action="store_true", help="the last page leads to the first")
    parser.add_argument("--pages", action="store_true", help="index.html is a folder's page")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--page", type=int, default=1000)
    parser.add_argument("--token", default="")
    parser.add_argument("--log", default="")
    state = State(parser.parse_args())
    main_server, cdn_server = (
        _Server(("127.0.0.1", 0), type("H", (Handler,), {"state": state, "cdn": cdn}))
        for cdn in (False, True)
    )
    state.cdn = cdn_server.server_address[1]
    for server in (main_server, cdn_server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": main_server.server_address[1], "cdn": state.cdn}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
