# SPDX-License-Identifier: Apache-2.0
"""The main use on the MiniMax-M3 golden: export a mix, check it, catch a damaged copy, measure the
loss.

    python goldens/demo.py [--out DIR]

It runs the commands that a release engineer runs, prints each, and fails if one has an unexpected
exit code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOLDEN = Path(__file__).parent / "minimax-m3-tiny"


def ckptgate(*args: str, expect: int) -> str:
    """Run a command, print it with its output, and return the output."""
    print(f"\n$ ckptgate {' '.join(args)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "verifier", *args], capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr, end="", flush=True)
    print(f"exit {done.returncode}", flush=True)
    if done.returncode != expect:
        raise SystemExit(f"expected exit {expect}, got {done.returncode}")
    return done.stdout


def break_copy(source: Path, copy: Path) -> str:
    """Copy a checkpoint and zero one block scale of one routed expert; return the tensor's name."""
    shutil.copytree(source, copy)
    shard = next(iter(sorted(copy.glob("*.safetensors"))))
    with shard.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        name = next(
            n for n in sorted(header) if ".experts.5.w2.weight_scale" in n and not n.endswith("_2")
        )
        begin, _ = header[name]["data_offsets"]
        columns = header[name]["shape"][1]
        handle.seek(8 + length + begin + 12 * columns + 3)
        handle.write(b"\0")
    return name


def main() -> None:
    """Run the four steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the checkpoints in this new directory")
    args = parser.parse_args()
    started = time.monotonic()
    work = args.out or Path(tempfile.mkdtemp(prefix="ckptgate-demo-"))
    work.mkdir(exist_ok=True)
    bf16, vendor = str(GOLDEN / "bf16"), str(GOLDEN / "mxfp8")
    mixed, broken = work / "MiniMax-M3-tiny-NVFP4", work / "broken"
    try:
        print("1. Export: NVFP4 routed experts onto the vendor's MXFP8 base; ends with a check.")
        ckptgate(
            "export", bf16, str(mixed), "--recipe", "nvfp4_experts_only", "--onto", vendor, expect=0
        )
        print("\n2. Check: every rule, every scale, every weight against the base.")
        good = ckptgate(
            "check",
            str(mixed),
            "--base",
            bf16,
            "--merged-from",
            vendor,
            "--depth",
            "payload",
            expect=0,
        )
        name = break_copy(mixed, broken)
        print(f"\n3. Break a copy: one byte of {name} (row 12, block 3) set to zero.")
        bad = ckptgate("check", str(broken), "--depth", "payload", expect=1)
        if "QC501" not in bad or name not in bad or "row 12, block 3" not in bad:
            raise SystemExit("the damage was not reported at its place")
        print("\n4. Gate: the loss on text sampled from the base model, with a 90% interval.")
        gate = ckptgate(
            "gate", str(mixed), "--base", bf16, "--corpus", str(GOLDEN / "corpus.jsonl"), expect=0
        )
        print("\n" + "=" * 100)
        print(f"export          wrote {mixed.name}, checked")
        print(f"check           {good.splitlines()[-1]}")
        print(
            f"broken copy     {bad.splitlines()[0]}\n                {bad.splitlines()[1].strip()}"
        )
        print(f"                {bad.splitlines()[-1]}")
        for line in gate.splitlines():
            if line.startswith(("Δloss", "margin", "KL", "verdict")):
                print(f"gate            {line}")
        print(f"{time.monotonic() - started:.0f} s in all")
    finally:
        if args.out is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
