# SPDX-License-Identifier: Apache-2.0
"""How many bytes and requests a check takes, on the tiny checkpoints and on the real layout of
MiniMax-M3.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import verifier
from tests import sparse
from tests.remote.conftest import BASE, CANDIDATE, Server

# Not getrusage: its peak is at least that of the process which started this one.
MEASURED = (
    "import re, sys; from verifier.cli import run; code = run(sys.argv[1:]); "
    "status = open('/proc/self/status').read(); "
    "print(re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr); sys.exit(code)"
)


def headers_and_configs(folder: Path) -> int:
    """Return the bytes of all headers and JSON files."""
    total = 0
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            with file.open("rb") as handle:
                total += 8 + int.from_bytes(handle.read(8), "little")
        elif file.suffix == ".json":
            total += file.stat().st_size
    return total


def to_shards(server: Server) -> Counter[str]:
    """Return the number of requests for each shard, redirects included."""
    paths = (r["path"].partition("?")[0] for r in server.requests())
    return Counter(p.rpartition("/")[2] for p in paths if p.endswith(".safetensors"))


def fetched(report: verifier.Report) -> int:
    assert report.summary.fetched is not None
    return report.summary.fetched.bytes


def test_a_header_check_of_a_sharded_repository(hub: Server, shared_data: Path) -> None:
    source = shared_data / "modelopt" / "m3_bf16_sharded"
    (hub.root / "org" / "sharded").symlink_to(source)
    report = verifier.check("org/sharded")
    assert fetched(report) <= 1.3 * headers_and_configs(source)
    assert len(to_shards(hub)) > 1
    assert set(to_shards(hub).values()) == {2}  # the redirect, and the range


def test_a_payload_check(hub: Server) -> None:
    folder = hub.root / "org" / CANDIDATE
    near = verifier.open_checkpoint(folder)
    report = verifier.check(f"org/{CANDIDATE}", depth="payload")
    assert report.summary.contents is not None
    scales = report.summary.contents.scale_bytes
    weights = {"U8", "F8_E4M3"}
    plain = sum(t.nbytes for t in near.tensors.values() if t.dtype not in weights)
    assert fetched(report) <= 1.1 * (headers_and_configs(folder) + scales + plain)

    base = hub.root / "org" / BASE
    report = verifier.check(f"org/{CANDIDATE}", base=f"org/{BASE}", depth="payload")
    everything = sum(p.stat().st_size for f in (folder, base) for p in f.iterdir())
    assert fetched(report) <= 1.1 * everything


def test_a_shard_larger_than_the_memory_for_it(
    hub: Server, environment: pytest.MonkeyPatch
) -> None:
    whole = fetched(verifier.check(f"org/{CANDIDATE}", base=f"org/{BASE}", depth="payload"))
    environment.setattr("verifier.checkpoint.remote.BUDGET", 60_000)
    environment.setattr("verifier.checkpoint.remote.CHUNK", 8_000)
    report = verifier.check(f"org/{CANDIDATE}", base=f"org/{BASE}", depth="payload")
    assert report.verdict == "passed"
    assert fetched(report) <= 1.1 * whole


def test_a_command_reads_no_more_of_a_weight_than_it_shows(hub: Server) -> None:
    from verifier.cli import run

    folder = hub.root / "org" / CANDIDATE
    assert run(["show", f"org/{CANDIDATE}", "model.layers.0.mlp.experts.0.gate_proj.weight"]) == 0
    sizes = [r["bytes"] for r in hub.requests()]
    assert sum(sizes) <= 1.3 * headers_and_configs(folder) + 1024


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the real layout of the mixed MiniMax-M3, sparse: 60 shards."""
    if not sparse.TABLE.exists():
        pytest.skip("the tensor table of MiniMax-M3 is not here")
    root = tmp_path_factory.mktemp("minimax")
    tensors = sparse.mixed(sparse.rows())
    config = {**sparse.m3_config(), "quantization_config": sparse.release_quantization(tensors)}
    (root / "org").mkdir()
    sparse.write(root / "org" / "MiniMax-M3-NVFP4", tensors, config, 60)
    return root


def test_the_verdict_on_minimax_m3(
    serve: Callable[..., Server], minimax: Path, environment: pytest.MonkeyPatch
) -> None:
    server = serve(minimax, "--hub", "--delay", "0.05")
    environment.setenv("HF_ENDPOINT", server.url)
    argv = ["check", "org/MiniMax-M3-NVFP4", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *argv],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)["stats"]
    assert (stats["tensors"], stats["shards"]) == (89_614, 60)
    needed = headers_and_configs(minimax / "org" / "MiniMax-M3-NVFP4")
    assert stats["traffic"]["bytes"] <= 1.3 * needed
    assert len(to_shards(server)) == 60
    assert max(to_shards(server).values()) <= 2
    match = re.search(r"(\d+)\s*$", done.stderr)
    assert match is not None
    assert int(match[1]) << 10 < 300_000_000
