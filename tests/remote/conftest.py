# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback, each a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT
from verifier.cli import run

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("huggingface_hub")

TOKEN = "hf_" + "SecretTokenOfTheTests" * 2
CANDIDATE, BASE = "qwen3moe_nvfp4_experts_max", "src_qwen3moe"
VENDOR, MIXED = "m3_vendor_mxfp8_like", "m3_mixed_example"
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@dataclass
class Server:
    """A running server: its directory, address and the requests that it answered."""

    root: Path
    port: int
    cdn: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests(self) -> list[dict]:
        """Return the requests so far; one that is being answered is waited for."""
        httpx2.get(f"{self.url}/_idle", trust_env=False, timeout=20)
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def forget(self) -> None:
        self.requests()
        self.log.write_text("")

    def fault(self, **faults: dict) -> None:
        """Set what goes wrong, by file name with ``__`` for a dot and ``___`` for a slash."""
        named = {k.replace("___", "/").replace("__", "."): v for k, v in faults.items()}
        (self.root / ".faults.json").write_text(json.dumps(named))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server of a directory with options of tests.remote.server."""
    running = []

    def start(root: Path, *options: str) -> Server:
        log = tmp_path / f"requests-{len(running)}.log"
        log.write_text("")
        line = [sys.executable, "-m", "tests.remote.server", str(root), "--log", str(log)]
        process = subprocess.Popen(
            [*line, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        running.append(process)
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        return Server(root, ports["port"], ports["cdn"], log)

    yield start
    for process in running:
        process.communicate(timeout=30)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keep this test's caches to itself, without proxies, tokens and offline mode."""
    for name in (*NETWORK, "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CKPTGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("verifier.checkpoint.remote.BACKOFF", 0.01)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    return monkeypatch


@pytest.fixture
def repositories(tmp_path: Path, shared_data: Path) -> Path:
    """Return a directory with copies of checkpoints as ``org/NAME``."""
    root = tmp_path / "hub"
    for name in (CANDIDATE, BASE):
        shutil.copytree(shared_data / "modelopt" / name, root / "org" / name)
    return root


@pytest.fixture
def hub(
    serve: Callable[..., Server], repositories: Path, environment: pytest.MonkeyPatch
) -> Server:
    """Return a hub-shaped server of `repositories`, which this process and its children use."""
    server = serve(repositories, "--hub", "--token", TOKEN)
    environment.setenv("HF_ENDPOINT", server.url)
    return server


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        code = run([str(a) for a in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def command(environment: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a command line in a process of its own."""

    def run_it(*argv: object, **more: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-W", "ignore", "-m", "verifier", *map(str, argv)]
        return subprocess.run(
            line,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run_it
