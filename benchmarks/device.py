# SPDX-License-Identifier: Apache-2.0
"""Encoding, decoding, the scale sweep and calibration on one device.

    python benchmarks/device.py [--device cuda] [--rounds 9] [--rows 8192] [--model DIR]

A BF16 weight of 8,192 columns is encoded and decoded in each format, and its scales are chosen by
each search; a copy of the weight in the same rounds shows the bandwidth of the device. Calibration
runs over sequences of 512 tokens, in turn with the plain forward pass of the same model: the golden
MiniMax-M3, or --model. On a CPU, one thread. Writes benchmarks/results/device-DEVICE.json; exits
with 3 if there is no such device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exporter import calibrate, codecs, weights
from verifier.load.model import load_model

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny" / "bf16"
FORMATS = ("nvfp4", "mxfp8", "fp8", "fp8_per_channel", "fp8_block")
COLUMNS, SEQUENCES, LENGTH = 8192, 16, 512


def seconds_of(way: Callable[[], object], device: str) -> float:
    """Return the seconds until the device has done something."""
    started = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def codec_ways(device: str, rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what is timed on a weight, by name, each with the bytes that it reads and writes."""
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(7)).bfloat16().to(device)
    copy = torch.empty_like(x)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: copy.copy_(x), 2 * x.nbytes)
    }
    for fmt in FORMATS:
        parts = codecs.encode(x, fmt)
        nbytes = x.nbytes + sum(t.nbytes for t in parts.values())

        def encode(fmt: str = fmt) -> object:
            return codecs.encode(x, fmt)

        def decode(fmt: str = fmt, parts: codecs.Parts = parts) -> object:
            return codecs.decode(parts, fmt, dtype=torch.bfloat16, out=copy)

        ways |= {f"encode {fmt}": (encode, nbytes), f"decode {fmt}": (decode, nbytes)}
    for method in weights.METHODS:
        if method != "max":

            def search(method: weights.Method = method) -> object:
                return weights.encode(x, "nvfp4", method=method)

            ways[f"search {method}"] = (search, x.nbytes)
    return ways


def calibration_ways(device: str, source: Path, folder: Path) -> dict[str, Callable[[], float]]:
    """Return functions that return the seconds of a sequence, calibrated and in a plain forward
    pass.
    """
    model = load_model(str(source), device=device).model
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(
        3, model.config.get_text_config().vocab_size, (SEQUENCES, LENGTH), generator=generator
    )
    texts = folder / "ids.jsonl"
    texts.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids.tolist()))

    def calibrated() -> float:
        ends: list[float] = []

        def progress(_done: int, _total: int) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        calibrate(
            source,
            folder / "stats.safetensors",
            recipe="nvfp4_experts_only",
            texts=[texts],
            samples=[SEQUENCES],
            seq_len=LENGTH,
            device=device,
            overwrite=True,
            progress=progress,
        )
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def forward() -> float:
        with torch.inference_mode():
            each = [
                seconds_of(
                    lambda row=row: model(
                        input_ids=row.to(device)[None], use_cache=False, logits_to_keep=1
                    ),
                    device,
                )
                for row in ids
            ]
        return statistics.mean(each[1:])

    return {"calibrate": calibrated, "forward": forward}


def arguments() -> argparse.Namespace:
    """Parse the command line; exit with 3 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--model", type=Path, default=GOLDEN)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("device.py: no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(3)
    args.out = args.out or ROOT / "benchmarks" / "results" / f"device-{args.device}.json"
    return args


def main() -> None:
    """Measure, write, and print the rates."""
    args = arguments()
    torch.set_num_threads(1)
    ways = codec_ways(args.device, args.rows)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        passes = calibration_ways(args.device, args.model, Path(folder))
        for _ in range(args.rounds + 1):
            row = {name: seconds_of(way, args.device) for name, (way, _) in ways.items()}
            rounds.append(row | {name: way() for name, way in passes.items()})
    del rounds[0]  # fills caches
    result: dict[str, Any] = {
        "command": f"python benchmarks/device.py --device {args.device} --rows {args.rows}",
        "nbytes": {name: nbytes for name, (_, nbytes) in ways.items()},
        "rounds": [{name: float(f"{s:.4g}") for name, s in row.items()} for row in rounds],
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers")},
        },
        "machine": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, one thread of {os.cpu_count()} processors, shared",
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, nbytes in result["nbytes"].items():
        print(f"{name}: {nbytes / statistics.median(r[name] for r in rounds) / 1e9:.2f} GB/s")
    ratio = statistics.median(r["calibrate"] / r["forward"] for r in rounds)
    print(f"calibrate: {ratio:.2f} of a plain forward pass")


if __name__ == "__main__":
    main()
