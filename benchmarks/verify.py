# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the verifier on the real MiniMax-M3 mixed release and on slices of it.

    python benchmarks/verify.py [--rounds 9] [--only header,scan,payload,memory] [--out FILE]

Parts:

- ``header``: the whole command at depth header, each run a process of its own: on the release and
  on copies of it with fewer and more layers (22,000 to 350,000 tensors in sparse files); on the
  release with its BF16 base, and with the vendor's checkpoint as ``--merged-from``; on a tiny
  checkpoint. The reference is a process that parses the headers of the release with the standard
  library alone.
- ``scan``: depth payload without a base, on one layer with all 128 experts; scales lie between the
  codes as in the release. The reference is ``readinto`` of the same bytes.
- ``payload``: depth payload with a base, on one layer with some experts, by one worker and by two.
  The reference is ``readinto`` of both checkpoints.
- ``memory``: what depth payload allocates beyond the idle process, on tensors far larger than any
  expert.

Within a part everything runs in turn in each round; the first round fills caches and is left out.
Layers of a slice have the released names, shapes and dtypes; values are random, and the same rows
again and again. Needs about 3 GB of disk and 4 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import verifier
from benchmarks.machine import allocated
from tests import sparse
from verifier.findings import Report
from verifier.reconstruction.yardstick import max_scales
from verifier.schemes import SCALE_LEAVES

LAYERS = (15, 30, 60, 120, 234)
TINY = Path(__file__).parents[1] / "tests" / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
CHILD_ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
PARSE = """
import glob, json, sys
for f in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with open(f, "rb") as h:
        json.loads(h.read(int.from_bytes(h.read(8), "little")))
"""
MEMORY = """
import sys
import verifier
from verifier.rules import all_rules
all_rules()
verifier.check(sys.argv[2], depth="payload")
print(flush=True)
sys.stdin.readline()
verifier.check(sys.argv[1], base=sys.argv[3] or None, depth="payload", workers=int(sys.argv[4]))
"""
Row = sparse.Row


def run(args: list[str]) -> tuple[float, float, float, str]:
    """Return seconds, seconds of processor, peak megabytes and output of one process."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, text=True, env=CHILD_ENV
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{args} ended with {child.returncode}:\n{output[:2000]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, output


def grown(arguments: list[str]) -> tuple[float, float]:
    """Return the megabytes that an idle process has allocated, and by how many it and its copies
    grow in a payload check.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", MEMORY, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=CHILD_ENV,
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    idle = peak = allocated(child.pid)
    child.stdin.write("\n")
    child.stdin.close()
    while child.poll() is None:
        peak = max(peak, allocated(child.pid))
        time.sleep(0.005)
    if child.returncode:
        raise SystemExit(f"the check ended with {child.returncode}")
    return idle, peak - idle


def release(layers: int) -> tuple[list[Row], dict[str, object]]:
    """Return tensors and config of the mixed release with as many layers, the first three dense."""
    found = []
    for name, dtype, shape in sparse.mixed(sparse.rows()):
        number = re.search(r"language_model\.model\.layers\.(\d+)\.", name)
        if number is None or int(number[1]) < min(3, layers):
            found.append((name, dtype, shape))
        elif number[1] == "3":
            found += [
                (name.replace(".layers.3.", f".layers.{i}.", 1), dtype, shape)
                for i in range(3, layers)
            ]
    config = sparse.m3_config()
    flags = [0] * 3 + [1] * (layers - 3)
    text: Any = config["text_config"]
    config["text_config"] = text | {
        "num_hidden_layers": layers,
        "moe_layer_freq": flags,
        "sparse_attention_config": {"sparse_attention_freq": flags},
    }
    return found, config


def declared(tensors: list[Row]) -> dict[str, object]:
    """Return the release's declaration for these tensors: its exclusions name the routers that are
    there.
    """
    gates = [
        n.removesuffix(".weight")
        for n, _, _ in tensors
        if n.endswith(".block_sparse_moe.gate.weight")
    ]
    body = sparse.release_quantization(tensors)
    vendor: Any = body["exclude_modules"]
    return body | {"exclude_modules": [e for e in vendor if not e.endswith(".gate")] + gates}


def layer(experts: int) -> list[Row]:
    """Return the tensors of the first sparse layer with as many experts, module by module."""
    rows = [
        r for r in sparse.mixed(sparse.rows()) if r[0].startswith("language_model.model.layers.3.")
    ]
    kept = [
        r for r in rows if not (n := re.search(r"\.experts\.(\d+)\.", r[0])) or int(n[1]) < experts
    ]
    return sorted(kept, key=lambda r: [int(p) if p.isdigit() else -1 for p in r[0].split(".")])


def config_of(tensors: list[Row], experts: int) -> dict[str, object]:
    """Return the config of a slice."""
    config = sparse.m3_config()
    text: Any = config["text_config"]
    config["text_config"] = text | {
        "num_local_experts": experts,
        "num_hidden_layers": 4,
        "moe_layer_freq": [0, 0, 0, 1],
        "sparse_attention_config": {"sparse_attention_freq": [0, 0, 0, 1]},
    }
    return config | {"quantization_config": declared(tensors)}


def write_release(layers: int, path: str) -> int:
    """Write the release with as many layers as sparse files and return the number of its
    tensors.
    """
    rows, config = release(layers)
    sparse.write(Path(path), rows, config | {"quantization_config": declared(rows)}, layers)
    return len(rows)


def write_sources(base: str, vendor: str) -> None:
    """Write what the release was made from as sparse files: the BF16 model, and the vendor's
    checkpoint, from which it keeps all but the routed experts.
    """
    rows, config = sparse.rows(), sparse.m3_config()
    sparse.write(Path(base), sparse.bf16(rows), config, 60)
    quantization = {"quantization_config": sparse.vendor_quantization()}
    sparse.write(Path(vendor), rows, config | quantization, 60)


def header_part(rounds: int, folder: Path) -> dict[str, Any]:
    """Measure header checks."""
    paths = {layers: str(folder / str(layers)) for layers in LAYERS}
    # A process inherits the peak of the one that starts it: this one stays small.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        tensors = {
            layers: pool.submit(write_release, layers, path).result()
            for layers, path in paths.items()
        }
        base, vendor = str(folder / "base"), str(folder / "vendor")
        pool.submit(write_sources, base, vendor).result()
    commands = {
        f"check_{layers}": ["-m", "verifier", "check", path] for layers, path in paths.items()
    }
    commands |= {
        "with_base": [*commands["check_60"], "--base", base],
        "with_merged_from": [*commands["check_60"], "--merged-from", vendor],
        "parse_60": ["-c", PARSE, paths[60]],
        "tiny": ["-m", "verifier", "check", str(TINY)],
    }
    raw = []
    for _ in range(rounds + 1):
        one: dict[str, float] = {}
        for name, command in commands.items():
            one[f"{name}_s"], one[f"{name}_cpu_s"], one[f"{name}_mb"], _ = run(command)
        x = [math.log(tensors[n]) for n in LAYERS]
        y = [math.log(one[f"check_{n}_s"]) for n in LAYERS]
        one["slope"] = float(np.polyfit(x, y, 1)[0])
        raw.append(one)
    return {"rounds": raw[1:], "tensors": {str(k): v for k, v in tensors.items()}}


ROWS = 1024
"""Rows of values that are drawn."""


class Values:
    """Random bytes of tensors: few rows, again and again, so that gigabytes are written in seconds.

    Every module begins with another of these rows, for no two modules of a real checkpoint are
    alike.
    """

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.made: dict[tuple[object, ...], dict[str, bytes]] = {}
        self.first: dict[str, int] = {}

    def of(self, module: str, leaf: str, dtype: str, shape: tuple[int, ...]) -> bytes:
        """Return the bytes of base, codes or scales of a weight: `ROWS` rows, a scalar whole."""
        data = self._rows(dtype, shape)[leaf]
        if len(data) < ROWS:
            return data
        cut = self.first.setdefault(module, len(self.first)) % ROWS * (len(data) // ROWS)
        return data[cut:] + data[:cut]

    def _rows(self, dtype: str, shape: tuple[int, ...]) -> dict[str, bytes]:
        key = dtype, shape[-1]
        if key not in self.made:
            width = shape[-1] * (2 if dtype == "U8" else 1)
            values = (self.rng.standard_normal((ROWS, width)) * 0.02).astype(ml_dtypes.bfloat16)
            wide = values.astype(np.float32)
            name = "nvfp4" if dtype == "U8" else "mxfp8"
            scales = max_scales(wide, name) or {}
            step = scales["weight_scale"].view(np.uint8)
            if name == "nvfp4":
                table = (
                    step.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales["weight_scale_2"]
                )
                codes = (
                    (wide / np.repeat(table, 16, 1))
                    .clip(-6, 6)
                    .astype(ml_dtypes.float4_e2m1fn)
                    .view(np.uint8)
                )
                stored = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
            else:
                table = step.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
                stored = (
                    (wide / np.repeat(table, 32, 1))
                    .clip(-448, 448)
                    .astype(ml_dtypes.float8_e4m3fn)
                    .view(np.uint8)
                )
            self.made[key] = {
                "base": values.tobytes(),
                "weight": stored.tobytes(),
                "weight_scale": step.tobytes(),
                "weight_scale_inv": step.tobytes(),
                "weight_scale_2": np.float32(scales.get("weight_scale_2", 1)).tobytes(),
                "input_scale": np.float32(0.01).tobytes(),
            }
        return self.made[key]

    def fill(self, path: Path, pick: Callable[[str, str, tuple[int, ...]], bytes | None]) -> Path:
        """Write into the sparse shards of a folder what ``pick`` gives for each tensor, again and
        again; None is a hole.
        """
        for file in sorted(path.glob("*.safetensors")):
            with file.open("r+b") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(length))
                for name, entry in header.items():
                    if name == "__metadata__":
                        continue
                    begin, end = entry["data_offsets"]
                    data = pick(name, entry["dtype"], tuple(entry["shape"]))
                    if data is None:
                        continue
                    handle.seek(8 + length + begin)
                    left = end - begin
                    while left:
                        left -= handle.write(data[: min(left, len(data))])
        return path


def plain(dtype: str, values: Values) -> bytes:
    """Return the bytes of 64 rows of an unquantized tensor."""
    wide = values.rng.standard_normal((64, 6144)).astype(np.float32)
    return wide.tobytes() if dtype == "F32" else wide.astype(ml_dtypes.bfloat16).tobytes()


def write_slice(
    folder: Path, rows: list[Row], config: dict[str, object], *, holes: bool, values: Values
) -> Path:
    """Write a mixed checkpoint of these tensors; with ``holes`` without its codes."""
    weights = {n.removesuffix(".weight"): (d, s) for n, d, s in rows if n.endswith(".weight")}

    def pick(name: str, dtype: str, _shape: tuple[int, ...]) -> bytes | None:
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_LEAVES or dtype in ("U8", "F8_E4M3"):
            return None if holes and leaf == "weight" else values.of(module, leaf, *weights[module])
        return plain(dtype, values)

    # Embeddings, head and vision are left out: their names are missing in the slice, which costs
    # nothing to tell.
    return values.fill(sparse.write(folder, rows, config, 8), pick)


def write_base(
    folder: Path, rows: list[Row], config: dict[str, object], candidate: Path, values: Values
) -> Path:
    """Write the base of a slice: BF16 where it is quantized, else the slice's own bytes."""
    quantized = {
        n.removesuffix(".weight"): (d, s)
        for n, d, s in rows
        if d in ("U8", "F8_E4M3") and n.endswith(".weight")
    }
    own = verifier.open_checkpoint(candidate)
    base = [
        (n, "BF16", (s[0], s[1] * (2 if d == "U8" else 1)))
        if n.removesuffix(".weight") in quantized
        else (n, d, s)
        for n, d, s in rows
        if n.rpartition(".")[2] not in SCALE_LEAVES
    ]

    def pick(name: str, _dtype: str, _shape: tuple[int, ...]) -> bytes | None:
        module = name.removesuffix(".weight")
        if module in quantized:
            return values.of(module, "base", *quantized[module])
        return own.read(own.tensors[name]).tobytes()

    return values.fill(
        sparse.write(
            folder, base, {k: v for k, v in config.items() if k != "quantization_config"}, 8
        ),
        pick,
    )


def ranges(
    path: Path, wanted: Callable[[str, str], bool]
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the (offset, length) of each wanted tensor, by file, in the order of the file."""
    ckpt = verifier.open_checkpoint(path)
    return [
        (
            str(path / s.file),
            [(t.offset, t.nbytes) for t in s.tensors.values() if wanted(t.name, t.dtype)],
        )
        for s in ckpt.shards
    ]


def read_all(files: list[tuple[str, list[tuple[int, int]]]]) -> tuple[float, float, int]:
    """Return seconds, processor seconds and bytes of ``readinto`` of some ranges, into one buffer
    of the largest's size.
    """
    buffer = memoryview(bytearray(max(n for _, r in files for _, n in r)))
    started, cpu, total = time.perf_counter(), time.process_time(), 0
    for file, tensors in files:
        with open(file, "rb", buffering=0) as handle:
            for offset, length in tensors:
                handle.seek(offset)
                done = 0
                while done < length:
                    done += handle.readinto(buffer[done:length]) or 0
                total += length
    return time.perf_counter() - started, time.process_time() - cpu, total


def judged(path: Path, base: Path | None, workers: int) -> tuple[float, float, Report]:
    """Return seconds and processor seconds of a payload check in this process, which must find
    nothing in the values.
    """
    started, cpu = time.perf_counter(), time.process_time()
    report = verifier.check(path, base=base, depth="payload", workers=workers)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    wrong = [f for f in report.findings if f.rule > "QC5"]
    if wrong:
        raise SystemExit(f"the slice has findings: {wrong[:3]}")
    return seconds, cpu, report


def scan_part(rounds: int, folder: Path) -> dict[str, Any]:
    """Measure the scan of scales and unquantized tensors of a layer."""
    rows = layer(128)
    path = write_slice(folder / "scan", rows, config_of(rows, 128), holes=True, values=Values())
    files = ranges(
        path,
        lambda name, dtype: name.rpartition(".")[2] in SCALE_LEAVES or dtype in ("BF16", "F32"),
    )
    raw = []
    for _ in range(rounds + 1):
        read, read_cpu, count = read_all(files)
        one, one_cpu, _ = judged(path, None, 1)
        two, _, _ = judged(path, None, 2)
        raw.append(
            {
                "readinto_s": read,
                "check_s": one,
                "two_workers_s": two,
                "readinto_cpu_s": read_cpu,
                "check_cpu_s": one_cpu,
                "ratio": read / one,
                "speedup": one / two,
                "cpu_ratio": read_cpu / one_cpu,
            }
        )
    return {"rounds": raw[1:], "bytes": count, "tensors": len(rows)}


def payload_part(rounds: int, folder: Path) -> dict[str, Any]:
    """Measure the comparison of a layer with its base."""
    experts, values = 6, Values()
    rows = layer(experts)
    config = config_of(rows, experts)
    path = write_slice(folder / "mixed", rows, config, holes=False, values=values)
    base = write_base(folder / "base", rows, config, path, values)
    files = ranges(path, lambda *_: True) + ranges(base, lambda *_: True)
    raw = []
    for _ in range(rounds + 1):
        read, read_cpu, count = read_all(files)
        one, one_cpu, report = judged(path, base, 1)
        two, _, same = judged(path, base, 2)
        if (report.findings, report.coverage) != (same.findings, same.coverage):
            raise SystemExit("two workers say something else than one")
        raw.append(
            {
                "readinto_s": read,
                "check_s": one,
                "two_workers_s": two,
                "readinto_cpu_s": read_cpu,
                "check_cpu_s": one_cpu,
                "ratio": read / one,
                "speedup": one / two,
                "cpu_ratio": read_cpu / one_cpu,
            }
        )
    return {"rounds": raw[1:], "bytes": count, "tensors": len(rows)}


def memory_part(rounds: int, folder: Path) -> dict[str, Any]:
    """Measure allocated pages with an embedding of 200,064 x 6144 and an expert of 16,384 x
    16,384.
    """
    values, expert = Values(), "language_model.model.layers.3.block_sparse_moe.experts.0.w1"
    rows: list[Row] = [
        ("language_model.model.embed_tokens.weight", "BF16", (200064, 6144)),
        (f"{expert}.weight", "U8", (16384, 8192)),
        (f"{expert}.weight_scale", "F8_E4M3", (16384, 1024)),
        (f"{expert}.weight_scale_2", "F32", ()),
        (f"{expert}.input_scale", "F32", ()),
    ]
    config = config_of(rows, 1)
    path = values.fill(
        sparse.write(folder / "mixed", rows, config, 2),
        lambda n, _d, _s: (
            values.of(expert, n.rpartition(".")[2], "U8", (16384, 8192))
            if ".experts." in n
            else None
        ),
    )
    bases: list[Row] = [rows[0], (f"{expert}.weight", "BF16", (16384, 16384))]
    base = values.fill(
        sparse.write(folder / "base", bases, config, 2),
        lambda n, _d, _s: (
            values.of(expert, "base", "U8", (16384, 8192)) if ".experts." in n else None
        ),
    )
    raw = []
    for _ in range(min(3, rounds)):
        one = {}
        for name, against, workers in (
            ("scan", "", 1),
            ("payload", str(base), 1),
            ("payload_two_workers", str(base), 2),
        ):
            one["idle_mb"], one[f"{name}_mb"] = grown([str(path), str(TINY), against, str(workers)])
        raw.append(one)
    return {"rounds": raw, "largest_tensor_mb": 200064 * 6144 * 2 / 1e6}


PARTS = {"header": header_part, "scan": scan_part, "payload": payload_part, "memory": memory_part}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts; those left out keep their last results"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "verify.json"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory(prefix="ckptgate-bench-") as folder:
            part = PARTS[name](args.rounds, Path(folder))
        part["median"] = {
            k: statistics.median(r[k] for r in part["rounds"]) for k in part["rounds"][0]
        }
        result[name] = part
        print(name, json.dumps({k: round(v, 3) for k, v in part["median"].items()}), flush=True)
    result |= {
        "command": "python benchmarks/verify.py",
        "arguments": {"rounds": args.rounds, "only": args.only},
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("ckptgate", "numpy", "ml_dtypes")},
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
        "load": os.getloadavg(),
        "seconds": round(time.perf_counter() - started),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
