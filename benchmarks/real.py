# SPDX-License-Identifier: Apache-2.0
"""Check, export and merge of a MiniMax-M3 layer of real size, beside what the machine can do.

    python benchmarks/real.py [--experts 128] [--rounds 3] [--before TREE] [--scratch DIR]

One MoE layer as released (128 experts of w1, w3 [3072, 6144] and w2 [6144, 3072], attention, norms
and router), BF16 from a seeded generator, 15.3 GB; ``--experts 16`` is 1.9 GB. Every command is a
process of its own, and begins with a full page cache. Within a round everything runs in turn, `cp`,
SHA-256 and plain reads too: on a machine that other work shares, only ratios within a round mean
anything. What the machine gains with two processors at a time is measured with two processes that
share nothing.
``--before`` measures another checkout in turn with this one, with the Python of its ``.venv`` if it
has one; it must have ``--no-check``.
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
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import allocated, fill_page_cache  # noqa: E402
from tests import sparse  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "real.json"
LAYER = "language_model.model.layers.3."
MACHINE = (
    *("read", "read_export", "codec_max", "codec_max_2", "codec_sweep", "codec_sweep_2"),
    *("sha256", "cp_sync"),
)
"""Steps that say what the machine can do, whatever the checkout."""
ONCE = (*MACHINE, "check_base_numpy", "check_base_pair")
"""Steps that are measured with this checkout only."""
STEPS = (
    *MACHINE,
    *("start", "export_max", "export_sweep_1", "export_sweep", "export_command", "merge"),
    *("check_header", "check_payload", "check_base_numpy"),
    *("check_base_1", "check_base_pair", "check_base"),
    *("dry_run_whole", "dry_run_onto"),
)
SHARD_BYTES = 4_000_000_000
PIECE = 16 << 20
READ = """
import sys
buffer = memoryview(bytearray(16 << 20))
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
"""
SHA256 = """
import hashlib, sys
for name in sys.argv[1:]:
    with open(name, "rb") as handle:
        hashlib.file_digest(handle, "sha256")
"""
MAX = ("--recipe", "nvfp4_experts_only", "--input-scale", "one")
SWEEP = ("--recipe", "nvfp4_experts_only_mse", "--input-scale", "one")
WARM = """
import contextlib, importlib
with contextlib.suppress(ImportError):
    importlib.import_module("verifier.reconstruction.kernels")
"""
CODEC = """
import multiprocessing, sys, time, torch
from exporter import weights
torch.set_num_threads(1)
method, seconds, processes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
x = torch.randn(3072, 6144).bfloat16()
weights.encode(x, "nvfp4", method=method, threads=1)
def rate(_):
    started = time.perf_counter()
    done = 0
    while time.perf_counter() - started < seconds:
        weights.encode(x, "nvfp4", method=method, threads=1)
        done += 1
    return done * x.numel() * 2 / (time.perf_counter() - started)
with multiprocessing.get_context("fork").Pool(processes) as pool:
    print(sum(pool.map(rate, range(processes), chunksize=1)))
"""
PAIR = """
import subprocess, sys
for one in [subprocess.Popen(sys.argv[1:]) for _ in range(2)]:
    assert one.wait() in (0, 1, 3)
"""


def rows(experts: int) -> list[sparse.Row]:
    """Return the tensors of the layer with as many experts, in the order of the file."""
    found = []
    for name, dtype, shape in sparse.bf16(sparse.rows()):
        expert = name.partition(".experts.")[2].partition(".")[0]
        if name.startswith(LAYER) and (not expert.isdecimal() or int(expert) < experts):
            found.append((name, dtype, shape))
    return found


def make_source(folder: Path, experts: int) -> None:
    """Write the layer: normal values times 0.02, each tensor with a factor of its own."""
    text: Any = sparse.m3_config()["text_config"]
    config = sparse.m3_config() | {
        "text_config": text
        | {
            "num_local_experts": experts,
            "num_hidden_layers": 4,
            "moe_layer_freq": [0, 0, 0, 1],
            "sparse_attention_config": {"sparse_attention_freq": [0, 0, 0, 1]},
        }
    }
    tensors = rows(experts)
    nbytes = sum(int(np.prod(shape)) * (4 if dtype == "F32" else 2) for _, dtype, shape in tensors)
    sparse.write(folder, tensors, config, -(-nbytes // SHARD_BYTES))
    rng = np.random.default_rng(0)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("r+b") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    handle.seek(8 + length + begin)
                    _fill(handle, end - begin, entry["dtype"], rng)


def _fill(handle: Any, nbytes: int, dtype: str, rng: np.random.Generator) -> None:
    factor = np.float32(0.02 * rng.uniform(0.7, 1.4))
    width = 4 if dtype == "F32" else 2
    while nbytes:
        count = min(nbytes, PIECE) // width
        values = rng.standard_normal(count, np.float32) * factor
        data = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
        handle.write(data.tobytes())
        nbytes -= count * width


class Bench:
    """Runs commands one after another, with the package of one checkout."""

    def __init__(self, tree: Path, scratch: Path, experts: int, workers: int) -> None:
        self.tree, self.scratch, self.workers = tree, scratch, workers
        own = tree / ".venv" / "bin" / "python"
        self.interpreter = own if own.exists() else Path(sys.executable)
        self.source, self.export = scratch / "source", scratch / "export"
        self.experts = experts
        self.whole = scratch / "whole"
        self.onto = scratch / "onto"
        self.holes = scratch / "holes"
        self.holes.mkdir(exist_ok=True)
        self.environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}

    def run(
        self, *command: object, codes: tuple[int, ...] = (0,), **variables: str
    ) -> dict[str, Any]:
        """Return seconds, processor seconds and peak allocated megabytes of a process, and its
        output; ``variables`` are added to its environment.
        """
        fill_page_cache(self.holes)
        started = time.perf_counter()
        child = subprocess.Popen(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment | variables,
            cwd=self.scratch,
        )
        peak, sampled = 0.0, 0.0
        while (found := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            if time.perf_counter() - sampled >= 0.5:  # a sample takes processor time itself
                peak, sampled = max(peak, allocated(child.pid)), time.perf_counter()
            time.sleep(0.02)
        seconds, usage = time.perf_counter() - started, found[2]
        child.returncode = os.waitstatus_to_exitcode(found[1])
        assert child.stdout is not None
        output = child.stdout.read()
        if child.returncode not in codes:
            raise SystemExit(f"{command} ended with {child.returncode}:\n{output[-3000:]}")
        cpu = usage.ru_utime + usage.ru_stime
        return {"s": seconds, "cpu_s": cpu, "allocated_mb": peak, "output": output}

    def python(self, script: str, *arguments: object) -> dict[str, Any]:
        """Run a script."""
        return self.run(self.interpreter, "-c", script, *arguments)

    def command(self, *arguments: object, **variables: str) -> dict[str, Any]:
        """Run ckptgate; findings about a slice of a model are no failure."""
        command = (self.interpreter, "-m", "ckptgate", *arguments)
        return self.run(*command, codes=(0, 1, 3), **variables)

    def removed(self, name: str) -> Path:
        """Return a path of the scratch folder that does not exist."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return what is measured, in the order in which it runs."""
        shards = sorted(self.source.glob("*.safetensors"))
        check = ("check", self.export, "--depth", "payload")
        based = (*check, "--base", self.source)
        unchecked = ("--no-check", "--workers")

        def results() -> list[Path]:
            return sorted(self.export.glob("*.safetensors"))

        def exported(*options: object) -> dict[str, Any]:
            return self.command("export", self.source, self.removed("out"), *options)

        def planned(source: Path, *options: object) -> dict[str, Any]:
            return self.command("export", source, "never", "--dry-run", *MAX, *options)

        def merged() -> dict[str, Any]:
            command = ("merge", self.export, self.removed("out"), "--onto", self.source)
            return self.command(*command, *unchecked, self.workers)

        def copied() -> dict[str, Any]:
            target = self.removed("copy")
            target.mkdir()
            return self.run("sh", "-c", 'cp "$@" && sync "$0"/*', target, *results(), target)

        def codec(method: str, processes: int = 1) -> dict[str, Any]:
            found = self.python(CODEC, method, 2, processes)
            nbytes = sum(f.stat().st_size for f in shards)
            return found | {"s": nbytes / float(found["output"])}

        return {
            "read": lambda: self.python(READ, *shards),
            "read_export": lambda: self.python(READ, *results()),
            "codec_max": lambda: codec("max"),
            "codec_max_2": lambda: codec("max", 2),
            "codec_sweep": lambda: codec("sweep"),
            "codec_sweep_2": lambda: codec("sweep", 2),
            "sha256": lambda: self.python(SHA256, *results()),
            "cp_sync": copied,
            "start": lambda: planned(self.source),
            "export_max": lambda: exported(*MAX, *unchecked, self.workers),
            "export_sweep_1": lambda: exported(*SWEEP, *unchecked, 1),
            "export_sweep": lambda: exported(*SWEEP, *unchecked, self.workers),
            "export_command": lambda: exported(*MAX),
            "merge": merged,
            "check_header": lambda: self.command("check", self.export, "--depth", "header"),
            "check_payload": lambda: self.command(*check),
            "check_base_numpy": lambda: self.command(*based, "--workers", "1", CKPTGATE_FAST="0"),
            "check_base_1": lambda: self.command(*based, "--workers", "1"),
            "check_base_pair": lambda: self.python(
                *(PAIR, self.interpreter, "-m", "ckptgate", *based, "--workers", "1")
            ),
            "check_base": lambda: self.command(*based, "--workers", str(self.workers)),
            "dry_run_whole": lambda: planned(self.whole),
            "dry_run_onto": lambda: planned(self.whole, "--onto", self.onto),
        }


def make_whole(bench: Bench) -> None:
    """Write the whole model, in BF16 and as the vendor has it, as sparse files."""
    vendor = sparse.rows()
    sparse.write(bench.whole, sparse.bf16(vendor), sparse.m3_config(), 60)
    declared = {"quantization_config": sparse.vendor_quantization()}
    sparse.write(bench.onto, vendor, sparse.m3_config() | declared, 60)


def measure(
    benches: dict[str, Bench], rounds: Mapping[str, int], only: list[str]
) -> dict[str, Any]:
    """Return the figures of every step of every checkout, round by round."""
    first = next(iter(benches.values()))
    fill_page_cache(first.holes)  # first, so that what is measured is the last to leave it
    make_source(first.source, first.experts)
    if any(name.startswith("dry_run") for name in only):
        make_whole(first)
    first.command("export", first.source, first.export, *MAX)
    for bench in benches.values():  # compile
        bench.python(f"{CODEC}\n{WARM}", "sweep", 0.01, 1)
        bench.python(CODEC, "max", 0.01, 1)
    steps = {label: bench.steps() for label, bench in benches.items()}
    raw: dict[str, dict[str, list[dict[str, float]]]] = {label: {} for label in benches}
    for number in range(max(rounds.values())):
        for name in only:
            for label in benches:
                if number >= rounds[label] or (name in ONCE and label != next(iter(benches))):
                    continue
                found = steps[label][name]()
                del found["output"]
                figures = {key: round(value, 3) for key, value in found.items()}
                raw[label].setdefault(name, []).append(figures)
                print(number + 1, label, name, figures, flush=True)
    sizes = {
        name: sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for name, folder in (("source", first.source), ("export", first.export))
    }
    return {"bytes": sizes, "rounds": raw}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default=",".join(STEPS), help="the steps to measure")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn with this")
    parser.add_argument("--before-rounds", type=int, help="rounds that it takes part in [all]")
    parser.add_argument("--scratch", type=Path, help="where the files go; on a disk, not in memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    trees = {"after": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    rounds = {"after": args.rounds, "before": args.before_rounds or args.rounds}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ckptgate-real-", dir=args.scratch) as folder:
        benches = {
            label: Bench(tree, Path(folder), args.experts, args.workers)
            for label, tree in trees.items()
        }
        result = measure(benches, rounds, args.only.split(","))
    result |= {
        "command": "python benchmarks/real.py",
        "arguments": {"experts": args.experts, "rounds": args.rounds, "workers": args.workers},
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("numpy", "torch", "numba")},
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
        "load": os.getloadavg(),
        "seconds": round(time.perf_counter() - started),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
