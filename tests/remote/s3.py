# SPDX-License-Identifier: Apache-2.0
"""S3 as moto serves it on loopback, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

KEY, SECRET = "TESTKEY0123456789", "TestSecret/0123456789"
BUCKET = "bucket"


def client(url: str) -> Any:
    import boto3

    session = boto3.Session(KEY, SECRET, region_name="us-east-1")
    return session.client("s3", endpoint_url=url)


def variables(url: str) -> dict[str, str]:
    """Return the environment of whoever reads and writes the server's buckets."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def serving() -> Iterator[str]:
    """Yield the URL of a running server that has `BUCKET`; skip the test where moto is missing."""
    for module in ("s3fs", "moto", "boto3"):
        pytest.importorskip(module)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _make_bucket(client(url))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _make_bucket(store: Any) -> None:
    """Make `BUCKET` as soon as the server answers, within a minute."""
    from botocore.exceptions import EndpointConnectionError

    for _ in range(600):
        with suppress(EndpointConnectionError):
            store.create_bucket(Bucket=BUCKET)
            return
        time.sleep(0.1)
    pytest.fail("moto does not answer")
