# SPDX-License-Identifier: Apache-2.0
"""Time encoding, decoding and the FP8 scale sweep beside ModelOpt, torchao and compressed-tensors,
on a CPU.

    python benchmarks/codecs.py [--peers /tmp/ckptgate-peers] [--rounds 9] [--out
    benchmarks/results/codecs.json]

Each library runs in a process of its own, from a virtual environment of its own that is made under
--peers; what cannot be installed is shown as not run. In each round every library makes one call,
so that all of them see the same moments of a shared machine; a copy of the input is timed in the
same rounds. First results are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
PEERS = {
    "modelopt": [
        "nvidia-modelopt==0.47.0",
        "requests",
        "huggingface_hub",
    ],  # imported, but not among its own requirements
    "torchao": ["torchao==0.18.0", "numpy"],
    "compressed-tensors": ["compressed-tensors==0.20.0", "numpy"],
}
OURS = ["ckptgate", "ckptgate fresh", "ckptgate torch"]
SHAPES = [(4096, 4096), (8, 1536, 4096)]
SWEEP = (512, 2048)
OPS = ["nvfp4_encode", "nvfp4_decode", "mxfp8_encode", "mxfp8_decode"]


class Worker:
    """A process that runs one library."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        # Threads that spin after their work would take the processor from the next library.
        env = os.environ | {
            "PYTHONPATH": str(ROOT) if name.startswith("ckptgate") else "",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if os.environ.get("PYTHONPATH") and name.startswith("ckptgate"):
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "codec_worker.py"), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.name = name
        self.version = self.ask({"op": "version"})["version"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended at {request}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(folder: Path, name: str) -> str | None:
    """Return the interpreter of a peer's environment, made where there is none; None where it
    cannot be made.
    """
    python = folder / name / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", torch, *PEERS[name]], check=False
        )
        if done.returncode:
            python.unlink()
            return None
    return str(python)


def rounds_of(
    workers: list[Worker], case: dict[str, Any], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Return the raw rounds of one case, for each library that has it; the peers stop when the
    seconds are used up.
    """
    started = time.monotonic()
    aside = case["threads"] > 1 and len(case["shape"]) > 2
    taking = [w for w in workers if not (aside and w.name in PEERS)]
    first = {w: w.ask(case)["seconds"] for w in taking}
    turns = {w: [s] for w, s in first.items() if s is not None}
    for _ in range(1, rounds):
        late = time.monotonic() - started > seconds
        for worker, found in turns.items():
            if not (late and worker.name in PEERS):
                found.append(worker.ask(case)["seconds"])
    return [
        {
            **case,
            "library": w.name,
            "median_s": statistics.median(s),
            "rounds_s": [round(x, 6) for x in s],
        }
        for w, s in turns.items()
    ]


def agreement(
    workers: list[Worker], case: dict[str, Any], folder: Path
) -> dict[str, dict[str, float]]:
    """Return which share of bytes (of decoded values) each library has like ours, by leaf."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for worker in workers:
        leaves = worker.ask({**case, "save": True}).get("leaves")
        if leaves is None or worker.name == "copy":
            continue
        raw, parts, start = np.fromfile(folder / f"{worker.name}.bin", np.uint8), {}, 0
        for leaf, size in leaves.items():
            parts[leaf] = raw[start : start + size]
            start += size
        found[worker.name] = parts
    ours = found.pop("ckptgate")
    unit = ml_dtypes.bfloat16 if case["dtype"] == "bf16" else np.float32
    shares: dict[str, dict[str, float]] = {}
    for name, parts in found.items():
        shares[name] = {}
        for leaf in ours.keys() & parts.keys():
            a, b = ours[leaf], parts[leaf]
            if case["op"].endswith("decode"):  # as numbers: -0 is 0
                a, b = a.view(unit).astype(np.float32), b.view(unit).astype(np.float32)
            shares[name][leaf] = float((a == b).mean()) if a.shape == b.shape else 0.0
    return shares


def cases() -> dict[str, dict[str, Any]]:
    """Return what is timed, by label; one shape after the other, and the sweep between them."""
    sweeps = [("sweep", 1), ("sweep_all", 1), ("sweep", 2)]
    every = [
        {"op": op, "dtype": dtype, "shape": shape, "threads": threads}
        for shape in SHAPES
        for dtype in ("f32", "bf16")
        for threads in (1, 2)
        for op in OPS
    ]
    half = len(every) // 2
    every[half:half] = [
        {"op": op, "dtype": "f32", "shape": SWEEP, "threads": t} for op, t in sweeps
    ]
    return {
        f"{c['dtype']}-{c['threads']}-{c['op']}-{'x'.join(map(str, c['shape']))}": c for c in every
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", type=Path, default=Path(tempfile.gettempdir()) / "ckptgate-peers"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=300, help="for all cases; the peers make fewer rounds then"
    )
    parser.add_argument(
        "--only", default="", help="cases whose name has this in it, such as f32-1-nvfp4"
    )
    parser.add_argument("--ours", action="store_true", help="without the peers")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "codecs.json"
    )
    args = parser.parse_args()
    started = time.monotonic()
    pythons = {name: None if args.ours else environment(args.peers, name) for name in PEERS}
    made = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(math.prod(s) for s in SHAPES)
        np.random.default_rng(0).standard_normal(count, np.float32).tofile(folder / "input.bin")
        here = {n: sys.executable for n in ["copy", *OURS]}
        workers = [
            Worker(n, p, folder)
            for n, p in (here | {n: p for n, p in pythons.items() if p}).items()
        ]
        measured, agree = [], {}
        every = [(label, case) for label, case in cases().items() if args.only in label]
        for place, (label, case) in enumerate(every):
            left = args.seconds - (time.monotonic() - made)
            found = rounds_of(workers, case, args.rounds, left / (len(every) - place))
            if case["threads"] == 1 and len(case["shape"]) == 2 and case["op"] in (*OPS, "sweep"):
                agree[label] = agreement(workers, case, folder)
            measured += found
            print(
                label,
                *(f"{r['library']} {r['median_s'] * 1e3:.1f}" for r in found),
                agree.get(label, ""),
                flush=True,
            )
        versions = {w.name: w.version for w in workers}
        for worker in workers:
            worker.stop()
    result = {
        "command": shlex.join(["python", "benchmarks/codecs.py", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - made),
        "install_s": round(made - started),
        "not_run": [n for n, p in pythons.items() if p is None],
        "versions": {"python": platform.python_version(), "torch": version("torch"), **versions},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
        "rounds": f"{args.rounds}; peers as many as {args.seconds:.0f} s allow, "
        "none on the stack with 2 threads",
        "agreement": agree,
        "measured": measured,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(
        json.dumps(result, separators=(",", ":")).replace('{"op"', '\n{"op"') + "\n"
    )


if __name__ == "__main__":
    main()
