# SPDX-License-Identifier: Apache-2.0
"""Damage an export of the MiniMax-M3 golden in known ways and ask what each measure of the gate sees.

    python benchmarks/damage.py [--out benchmarks/results/damage.json]

Bytes of a real export are edited; each damaged copy is scored once on the golden's own corpus and compared with the base
(absolute margin, the default budget) and with the undamaged export (drift margin, the default).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import exporter
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.gate import Run, compare_runs, drift_margin_of, load_corpus, margin_of, score_run

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
LAYER = 2
GLOBAL = r"w[123]\.weight_scale_2$"


def write(ckpt: Checkpoint, folder: Path, name: str, raw: bytes) -> None:
    """Give a tensor of a copy other bytes."""
    t = ckpt.tensors[name]
    if len(raw) != t.nbytes:
        raise ValueError(name)
    with (folder / t.file).open("r+b") as handle:
        handle.seek(t.offset)
        handle.write(raw)


def edit(ckpt: Checkpoint, folder: Path, pattern: str, change: Callable[[str, np.ndarray], bytes]) -> None:
    """Change every tensor of a layer whose name matches."""
    names = [n for n in ckpt.tensors if f".layers.{LAYER}." in n and re.search(pattern, n)]
    if not names:
        raise ValueError(pattern)
    for name in names:
        write(ckpt, folder, name, change(name, ckpt.array(ckpt.tensors[name])))


def sixteenth(_name: str, values: np.ndarray) -> bytes:
    """Return float32 values a sixteenth larger."""
    return (values.astype(np.float32) * np.float32(17 / 16)).astype(values.dtype).tobytes()


def zero(_name: str, values: np.ndarray) -> bytes:
    """Return zeros."""
    return bytes(values.nbytes)


def damages(ckpt: Checkpoint, experts: list[int]) -> dict[str, Callable[[Path], None]]:
    """Return what is done to a copy, by its description; ``experts`` are tokens of each expert of the layer."""
    busy, idle = int(np.argmax(experts)), int(np.argmin(experts))

    def swap(expert: str) -> Callable[[Path], None]:
        def other(name: str, _values: np.ndarray) -> bytes:
            twin = name.replace(".w1.", ".w3.") if ".w1." in name else name.replace(".w3.", ".w1.")
            return ckpt.read(ckpt.tensors[twin]).tobytes()

        return lambda folder: edit(ckpt, folder, rf"experts\.{expert}\.w[13]\.", other)

    return {
        "busiest expert of a layer answers zero": lambda f: edit(ckpt, f, rf"experts\.{busy}\.w2\.weight_scale$", zero),
        "idlest expert of a layer answers zero": lambda f: edit(ckpt, f, rf"experts\.{idle}\.w2\.weight_scale$", zero),
        "global scales of a layer's experts off by 1/16": lambda f: edit(ckpt, f, rf"experts\.\d+\.{GLOBAL}", sixteenth),
        "global scales of one expert off by 1/16": lambda f: edit(ckpt, f, rf"experts\.{busy}\.{GLOBAL}", sixteenth),
        "gate and up swapped in the busiest expert": swap(str(busy)),
        "gate and up swapped in a layer": swap(r"\d+"),
        "router recast to BF16 values": lambda f: edit(ckpt, f, r"gate\.weight$", _recast),
    }  # fmt: skip


def _recast(_name: str, values: np.ndarray) -> bytes:
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).tobytes()


def row(what: str, base: Run, good: Run, damaged: Run) -> dict[str, Any]:
    """Return what each measure says of a damaged export."""
    found = compare_runs(
        base, damaged, margin_of(None, damaged.header.formats), drift_against=good, drift_margin=drift_margin_of(None)
    )
    alone = compare_runs(base, damaged, margin_of(None, damaged.header.formats))
    own = compare_runs(good, damaged, margin_of(None, damaged.header.formats))
    if found.interval is None or found.drift is None or own.measures.kl is None or own.measures.top1 is None:
        raise SystemExit(f"{what}: no statistics")
    d = found.drift.interval
    return {
        "damage": what, "loss": round(found.interval.delta, 5), "absolute": alone.outcome,
        "drift": [round(x, 5) for x in (d.delta, d.low, d.high)], "with_drift": found.outcome,
        "kl_to_good": round(own.measures.kl.mean.delta, 5), "top1_to_good": round(own.measures.top1.delta, 4),
        "beyond": len(own.measures.beyond),
    }  # fmt: skip


def main() -> None:
    """Damage, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "damage.json")
    args = parser.parse_args()
    corpus, work = load_corpus(str(GOLDEN / "corpus.jsonl")), Path(tempfile.mkdtemp(prefix="ckptgate-damage-"))
    try:
        exporter.export(GOLDEN / "bf16", work / "good", recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8")

        def scored(folder: Path) -> Run:
            found = score_run(open_checkpoint(folder), corpus, top_k=64)
            if found is None:
                raise SystemExit("no run")
            return found

        base, good = scored(GOLDEN / "bf16"), scored(work / "good")
        ckpt = open_checkpoint(work / "good")
        counts = next(c for n, c in good.header.experts.items() if f"layers.{LAYER}." in n)
        rows = []
        for what, damage in damages(ckpt, counts).items():
            folder = shutil.copytree(work / "good", work / "damaged")
            damage(folder)
            rows.append(row(what, base, good, scored(folder)))
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
        first = compare_runs(base, good, margin_of(None, good.header.formats))
        result = {
            "command": "python benchmarks/damage.py", "layer": LAYER, "tokens_of_experts": counts, "rows": rows,
            "good": {"loss": round(first.interval.delta, 5) if first.interval else None, "absolute": first.outcome},
            "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "numpy")}},
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
