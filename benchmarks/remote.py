# SPDX-License-Identifier: Apache-2.0
"""Requests and bytes of each command on a remote checkpoint.

    python benchmarks/remote.py [--out benchmarks/results/remote.json]

A hub-shaped server on loopback (tests/remote/server.py) waits 50 ms before every answer. Commands
that read headers run on the real layout of MiniMax-M3 (60 sparse shards, 89,614 tensors); commands
that read weights run on the tiny MiniMax-M3 of goldens/ and an NVFP4 export of it. Requests and
bytes are the server's own count, redirects included. Each command is a process of its own; seconds
are wall time and processor time of that process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import sparse
from verifier.checkpoint import INDEX, open_checkpoint

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
DELAY = 0.05
RELEASE, BASE = "org/MiniMax-M3-NVFP4", "org/MiniMax-M3"
EXPORT, BF16, MXFP8 = "org/tiny-nvfp4", "org/tiny-bf16", "org/tiny-mxfp8"
RUN = (
    "import re, resource, sys; from verifier.cli import run; code = run(sys.argv[1:]); "
    "used = resource.getrusage(resource.RUSAGE_SELF); "
    "status = open('/proc/self/status').read(); peak = re.search(r'VmHWM:\\s+(\\d+)', status)[1]; "
    "print(f'used {peak} {used.ru_utime + used.ru_stime}', file=sys.stderr); sys.exit(code)"
)
RECIPE = ("--recipe", "nvfp4_experts_only", "--input-scale", "one")
CORPUS = ("--corpus", str(GOLDEN / "corpus.jsonl"), "--documents", "2", "--workers", "1")
EXPERT = "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight"


def commands(out: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return (checkpoint kind, command line) of every row."""
    manifest = str(out / "ckptgate_manifest.json")
    return [
        ("layout", ("check", RELEASE)),
        ("layout", ("check", RELEASE, "--base", BASE)),
        ("layout", ("stats", RELEASE)),
        ("layout", ("diff", RELEASE, BASE)),
        ("layout", ("export", BASE, str(out / "dry"), *RECIPE, "--dry-run")),
        ("tiny", ("check", EXPORT)),
        ("tiny", ("check", EXPORT, "--depth", "payload")),
        ("tiny", ("check", EXPORT, "--depth", "payload", "--base", BF16)),
        ("tiny", ("check", EXPORT, "--depth", "load", "--base", BF16)),
        ("tiny", ("stats", EXPORT, "--depth", "payload")),
        ("tiny", ("diff", EXPORT, EXPORT, "--depth", "payload")),
        ("tiny", ("show", EXPORT, EXPERT)),
        ("tiny", ("detect", BF16)),
        ("tiny", ("manifest", "verify", EXPORT, "--manifest", manifest)),
        ("tiny", ("export", BF16, str(out / "export"), *RECIPE)),
        ("tiny", ("export", BF16, str(out / "mixed"), *RECIPE[:2], "--onto", MXFP8)),
        ("tiny", ("gate", EXPORT, "--base", BF16, *CORPUS, "--max-increase", "8%")),
        ("tiny", ("score", EXPORT, *CORPUS, "-o", str(out / "again.run"))),
    ]


def repositories(root: Path, out: Path) -> None:
    """Write the checkpoints that the server shows."""
    vendor = sparse.rows()
    mixed = sparse.mixed(vendor)
    config = {**sparse.m3_config(), "quantization_config": sparse.release_quantization(mixed)}
    (root / "org").mkdir(parents=True)
    sparse.write(root / RELEASE, mixed, config, 60)
    sparse.write(root / BASE, sparse.bf16(vendor), sparse.m3_config(), 60)
    shutil.copytree(GOLDEN / "bf16", root / BF16)
    shutil.copytree(GOLDEN / "mxfp8", root / MXFP8)
    line = ["export", str(root / BF16), str(root / EXPORT), *RECIPE]
    subprocess.run([sys.executable, "-m", "verifier", *line], check=True, capture_output=True)
    shutil.copy(root / EXPORT / "ckptgate_manifest.json", out)


def measured(argv: tuple[str, ...], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command and return what it took."""
    log.write_text("")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"{argv}: exit {done.returncode}\n{done.stderr}")
    peak, cpu = done.stderr.rpartition("used ")[2].split()
    answered = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "requests": len(answered),
        "bytes": sum(a["bytes"] for a in answered),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(float(cpu), 2),
        "memory_mb": int(peak) // 1024,
        "exit": done.returncode,
    }


def folder_sizes(root: Path) -> dict[str, dict[str, int]]:
    """Return of each repository the bytes of its files, and those of headers and JSON files."""
    sizes = {}
    for folder in sorted((root / "org").iterdir()):
        checkpoint = open_checkpoint(folder)
        json_bytes = sum(n for name, n in checkpoint.files.items() if name.endswith(".json"))
        headers = sum(8 + s.header for s in checkpoint.shards)
        sizes[f"org/{folder.name}"] = {
            "bytes": sum(checkpoint.files.values()),
            "headers": headers + json_bytes,
            "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.tensors),
            "indexed": INDEX in checkpoint.files,
        }
    return sizes


def main() -> None:
    """Measure every command, and write or print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptgate-remote-") as temporary:
        root, out = Path(temporary) / "hub", Path(temporary) / "out"
        out.mkdir()
        repositories(root, out)
        log = Path(temporary) / "log"
        line = ["-m", "tests.remote.server", str(root), "--hub", "--delay", str(DELAY)]
        server = subprocess.Popen(
            [sys.executable, *line, "--log", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        port = json.loads(server.stdout.readline())["port"]
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(Path(temporary) / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        rows = []
        for kind, argv in commands(out):
            command = " ".join(a.replace(f"{out}/", "").replace(f"{GOLDEN}/", "") for a in argv)
            rows.append({"kind": kind, "command": command} | measured(argv, log, environment))
            print(json.dumps(rows[-1]), file=sys.stderr)
        result = {
            "command": "python benchmarks/remote.py",
            "delay": DELAY,
            "checkpoints": folder_sizes(root),
            "rows": rows,
            "versions": {
                "python": platform.python_version(),
                **{n: version(n) for n in ("ckptgate", "huggingface_hub", "httpx2")},
            },
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
        }
        server.communicate(timeout=30)
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        Path(options.out).write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
