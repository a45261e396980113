# SPDX-License-Identifier: Apache-2.0
"""Damage every layer of the goldens' exports, and see which module `ckptgate locate` blames first.

    python benchmarks/locate.py [--golden qwen3-moe-tiny]

The damages are those of benchmarks/damage.py, applied to each layer with experts. Exports with
scales by ``max`` are those that plain rounding gives, so that only the damaged layer differs; those
with scales by ``mse`` differ in every layer. A blame is right if the first module is the damaged
one of the damaged layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from damage import SUBJECTS, Subject, damages, scored

from verifier.gate import load_corpus
from verifier.locate import LocateOptions, locate

ROOT = Path(__file__).parents[1]
DOCUMENTS, TOKENS = 16, 32
RECIPES = {"max": "nvfp4_experts_only", "mse": "nvfp4_experts_only_mse"}
ALL = "scales of all layers' experts 1/16 too large"
Damage = tuple[str, int, Callable[[Path], None]]


def write_corpus(subject: Subject, file: Path) -> None:
    """Write the first tokens of the golden's first documents."""
    lines = (subject.folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    documents = [row["ids"][:TOKENS] for row in rows if "ids" in row][:DOCUMENTS]
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in documents))


def cases(subject: Subject, counts: dict[int, list[int]]) -> Iterator[Damage]:
    """Yield the damages of an export: description, layer, function."""
    layers = sorted(counts)
    for layer in layers:
        for name, damage in damages(subject, counts[layer], layers, layer).items():
            if name != ALL or layer == layers[0]:
                yield name, layer, damage


def row(case: Damage, folder: Path, base: Path, options: LocateOptions) -> dict[str, Any]:
    """Return what is blamed for a damage."""
    name, layer, _ = case
    started = time.monotonic()
    result = locate(folder, base, options)
    first = result.blames[0] if result.blames else None
    module = "router" if name.startswith("router") else "experts"
    place = first is not None and first.cell.name == module
    right = place and (name == ALL or (first is not None and first.layer.name == f"layer {layer}"))
    return {
        "damage": name,
        "layer": layer,
        "ratio": round(result.ratio.ratio, 4) if result.ratio else None,
        "outcome": result.outcome,
        "first": f"{first.layer.name} {first.cell.name}" if first else "",
        "right": right,
        "modules": len(result.blames),
        "explained": round(result.explained, 3),
        "cost": result.cost,
        "seconds": round(time.monotonic() - started, 1),
    }


def examine(subject: Subject, scales: str, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Damage one golden's export in every way and locate the damage, after each of which a row is
    added; what has a row already is left out.
    """
    done = {(r["damage"], r["layer"]) for r in rows}
    work = Path(tempfile.mkdtemp(prefix="ckptgate-locate-"))
    try:
        base = subject.folder / "bf16"
        vendor = subject.folder / subject.vendor if subject.vendor else None
        subject.export(base, vendor, work / "good", RECIPES[scales])
        write_corpus(subject, work / "corpus.jsonl")
        corpus = load_corpus(str(work / "corpus.jsonl"))
        experts = scored(work / "good", corpus).header.experts
        counts = {int(n.partition("layers.")[2].partition(".")[0]): c for n, c in experts.items()}
        clean = ("no damage", -1, lambda _folder: None)
        for case in [clean, *cases(subject, counts)]:
            if case[:2] in done:
                continue
            folder = shutil.copytree(work / "good", work / "damaged")
            case[2](folder)
            rows.append(row(case, folder, base, LocateOptions(corpus)))
            print(subject.golden, scales, rows[-1], flush=True)
            shutil.rmtree(folder)
            yield
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Damage, locate, and write after each damage; a file that is there is completed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "locate.json")
    parser.add_argument("--golden", action="append", choices=[s.golden for s in SUBJECTS])
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.is_file() else {}
    exports = {(e["golden"], e["scales"]): e for e in before.get("exports", [])}
    for scales in RECIPES:
        for subject in SUBJECTS:
            if args.golden and subject.golden not in args.golden:
                continue
            empty: dict[str, Any] = {"golden": subject.golden, "scales": scales, "rows": []}
            export = exports.setdefault((subject.golden, scales), empty)
            for _ in examine(subject, scales, export["rows"]):
                write(args.out, list(exports.values()))


def write(file: Path, exports: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    result = {
        "command": "python benchmarks/locate.py",
        "documents": DOCUMENTS,
        "tokens": TOKENS,
        "exports": exports,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "numpy")},
        },
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
