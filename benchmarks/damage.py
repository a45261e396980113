# SPDX-License-Identifier: Apache-2.0
"""Damage exports of the goldens in known ways, and measure what the gate's measures and the check
detect.

    python benchmarks/damage.py [--golden minimax-m3-tiny] [--wikitext]

Bytes of a real export are edited; each damaged copy is scored once on the golden's own corpus and
compared with the base (absolute margin, the default budget) and with the undamaged export (by the
loss and by the KL ratio, default margins), and checked at depth payload against the base; so are
two better exports. ``--wikitext`` scores one damage also on documents of WikiText-2's test split:
more text, a narrower interval.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import exporter
import verifier
from verifier.checkpoint import open_checkpoint
from verifier.gate import Run, compare_runs, drift_margin_of, load_corpus, margin_of, score_run
from verifier.gate.corpora import WIKITEXT, Corpus
from verifier.gate.decision import kl_margin_of, kl_ratio_of
from verifier.selftest.editor import CheckpointEditor

ROOT = Path(__file__).parents[1]
LAYER = 2
WIKI_DOCUMENTS = 24
OTHERS = {
    "no damage: scales by mse": "nvfp4_experts_only_mse",
    "no damage: FP8": "fp8_default",
}
"""Exports that are better than the accepted one, by their recipe."""
UNREACHED = "an expert that the text never reaches outputs zeros"


@dataclass(frozen=True)
class Subject:
    """A golden, how it is exported, and the names of its projections: gate, up, down."""

    golden: str
    vendor: str | None
    names: tuple[str, str, str]
    router: str = ""
    bias: str = ""
    layout: str | None = None

    @property
    def folder(self) -> Path:
        """The golden's directory."""
        return ROOT / "goldens" / self.golden

    def export(
        self, base: Path, vendor: Path | None, out: Path, recipe: str = "nvfp4_experts_only"
    ) -> None:
        """Write the export to damage: routed experts in NVFP4, onto the vendor's checkpoint where
        there is one; or another one.
        """
        how: dict[str, Any] = (
            {"onto": vendor} if vendor else {"input_scale": "one", "expert_layout": self.layout}
        )
        exporter.export(base, out, recipe=recipe, engine="none", **how)


SUBJECTS = (
    Subject(
        "minimax-m3-tiny",
        "mxfp8",
        ("w1", "w3", "w2"),
        r"gate\.weight$",
        r"e_score_correction_bias$",
    ),
    Subject("qwen3-moe-tiny", None, ("gate_proj", "up_proj", "down_proj")),
    Subject("gpt-oss-tiny", None, ("gate_proj", "up_proj", "down_proj"), layout="per-expert"),
)


def edit(
    folder: Path,
    pattern: str,
    change: Callable[[str, np.ndarray], bytes],
    *,
    layers: Sequence[int] = (LAYER,),
) -> None:
    """Replace the bytes of every tensor of some layers whose name matches by what ``change``
    returns for its values.
    """
    ckpt = open_checkpoint(folder)
    names = [
        n
        for n in ckpt.tensors
        if any(f".layers.{i}." in n for i in layers) and re.search(pattern, n)
    ]
    if not names:
        raise ValueError(pattern)
    made = {n: change(n, ckpt.array(ckpt.tensors[n])) for n in names}
    for name, raw in made.items():
        t = ckpt.tensors[name]
        if len(raw) != t.nbytes:
            raise ValueError(name)
        with (folder / t.file).open("r+b") as handle:
            handle.seek(t.offset)
            handle.write(raw)


def times(factor: float) -> Callable[[str, np.ndarray], bytes]:
    """Return a function that multiplies float32 values."""
    return lambda _name, values: (
        (values.astype(np.float32) * np.float32(factor)).astype(values.dtype).tobytes()
    )


def zero(_name: str, values: np.ndarray) -> bytes:
    """Return zeros."""
    return bytes(values.nbytes)


def to_bf16(_name: str, values: np.ndarray) -> bytes:
    """Return float32 values rounded to BF16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()


def recast(folder: Path, pattern: str, layer: int = LAYER) -> None:
    """Store tensors of a layer whose name matches in BF16."""
    editor = CheckpointEditor(folder)
    for name in [n for n in editor.tensors() if f".layers.{layer}." in n and re.search(pattern, n)]:
        editor.store(name, editor.array(name).astype(ml_dtypes.bfloat16))


def swap(subject: Subject, folder: Path, expert: str, layer: int = LAYER) -> None:
    """Exchange gate and up of some experts, with their scales."""
    gate, up, _ = subject.names
    ckpt = open_checkpoint(folder)

    def other(name: str, _values: np.ndarray) -> bytes:
        twin = (
            name.replace(f".{gate}.", f".{up}.")
            if f".{gate}." in name
            else name.replace(f".{up}.", f".{gate}.")
        )
        return ckpt.read(ckpt.tensors[twin]).tobytes()

    edit(folder, rf"experts\.{expert}\.({gate}|{up})\.", other, layers=(layer,))


def damages(
    subject: Subject, counts: list[int], layers: list[int], layer: int = LAYER
) -> dict[str, Callable[[Path], None]]:
    """Return functions that damage a layer of a copy, by description; ``counts`` are the tokens of
    each of its experts, ``layers`` all layers with experts.
    """
    here = (layer,)
    busiest, least_used = int(np.argmax(counts)), int(np.argmin(counts))
    down = subject.names[2]
    every = "|".join(subject.names)

    def scaled(expert: str, factor: float, where: Sequence[int] = here) -> Callable[[Path], None]:
        return lambda f: edit(
            f, rf"experts\.{expert}\.({every})\.weight_scale_2$", times(factor), layers=where
        )

    functions: dict[str, Callable[[Path], None]] = {
        "busiest expert of a layer outputs zeros": lambda f: edit(
            f, rf"experts\.{busiest}\.{down}\.weight_scale$", zero, layers=here
        ),
        "least-used expert of a layer outputs zeros": lambda f: edit(
            f, rf"experts\.{least_used}\.{down}\.weight_scale$", zero, layers=here
        ),
        "gate and up swapped in the busiest expert": lambda f: swap(
            subject, f, str(busiest), layer
        ),
        "gate and up swapped in a layer": lambda f: swap(subject, f, r"\d+", layer),
        "scales of a layer's experts a quarter too large": scaled(r"\d+", 5 / 4),
        "scales of a layer's experts 1/16 too large": scaled(r"\d+", 17 / 16),
        "scales of a layer's experts 1/16 too small": scaled(r"\d+", 15 / 16),
        "scales of a layer's experts 1/64 too large": scaled(r"\d+", 65 / 64),
        "scales of the busiest expert 1/16 too large": scaled(str(busiest), 17 / 16),
        "scales of all layers' experts 1/16 too large": scaled(r"\d+", 17 / 16, layers),
    }
    if subject.router:
        functions["router stored in BF16"] = lambda f: recast(f, subject.router, layer)
        functions["router of BF16 values, stored in float32"] = lambda f: edit(
            f, subject.router, to_bf16, layers=here
        )
    return functions


def scored(folder: Path, corpus: Corpus) -> Run:
    """Score a checkpoint."""
    run = score_run(open_checkpoint(folder), corpus, top_k=64)
    if run is None:
        raise SystemExit("no run")
    return run


def row(damage: str, base: Run, good: Run, damaged: Run) -> dict[str, Any]:
    """Return each measure of a damaged export."""
    margin, drift_margin = margin_of(None, damaged.header.parameters), drift_margin_of(None)
    result = compare_runs(base, damaged, margin, drift_against=good, drift_margin=drift_margin)
    alone, own = compare_runs(base, damaged, margin), compare_runs(good, damaged, margin)
    if (
        result.interval is None
        or result.drift is None
        or own.measures.kl is None
        or own.measures.top1 is None
    ):
        raise SystemExit(f"{damage}: no statistics")
    d = result.drift.interval
    by_kl = compare_runs(
        base,
        damaged,
        margin,
        drift_against=good,
        drift_margin=drift_margin,
        max_kl_ratio=kl_ratio_of(None),
        kl_margin=kl_margin_of(None, damaged.header.parameters),
    )
    ratio = by_kl.drift.kl.interval if by_kl.drift and by_kl.drift.kl else None
    if ratio is None:
        raise SystemExit(f"{damage}: no KL ratio")
    return {
        "damage": damage,
        "loss": round(result.interval.delta, 5),
        "absolute": alone.outcome,
        "drift": [round(x, 5) for x in (d.delta, d.low, d.high)],
        "with_drift": result.outcome,
        "kl_ratio": [round(math.exp(x), 4) for x in (ratio.delta, ratio.low, ratio.high)],
        "with_kl": by_kl.outcome,
        "kl_to_good": round(own.measures.kl.mean.delta, 5),
        "top1_to_good": round(own.measures.top1.delta, 4),
        "beyond": len(own.measures.beyond),
        "unreached": sum(len(e.unreached) for e in result.experts),
    }


def checked(folder: Path, base: Path, vendor: Path | None) -> list[str]:
    """Return the rules with findings."""
    report = verifier.check(folder, base=base, merged_from=vendor, depth="payload")
    return sorted({f.rule for f in report.findings if f.severity in ("error", "warning")})


def examine(subject: Subject, work: Path, only: str, before: dict[str, Any]) -> dict[str, Any]:
    """Damage, score and check one golden's export; damages that ``only`` does not match keep their
    earlier results.
    """
    earlier = {r["damage"]: r for r in before.get("rows", [])}
    base_dir = subject.folder / "bf16"
    vendor = subject.folder / subject.vendor if subject.vendor else None
    corpus = load_corpus(str(subject.folder / "corpus.jsonl"))
    subject.export(base_dir, vendor, work / "good")
    base, good = scored(base_dir, corpus), scored(work / "good", corpus)
    counts = next(c for n, c in good.header.experts.items() if f"layers.{LAYER}." in n)
    layers = sorted(int(re.search(r"layers\.(\d+)\.", n)[1]) for n in good.header.experts)  # type: ignore[index]
    rows = []
    for description, damage in damages(subject, counts, layers).items():
        if not fnmatch(description, only):
            rows += [earlier[description]] if description in earlier else []
            continue
        folder = shutil.copytree(work / "good", work / "damaged")
        damage(folder)
        rows.append(
            row(description, base, good, scored(folder, corpus))
            | {"check": checked(folder, base_dir, vendor)}
        )
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    for description, recipe in OTHERS.items():
        if not fnmatch(description, only):
            rows += [earlier[description]] if description in earlier else []
            continue
        out = work / recipe
        subject.export(base_dir, vendor, out, recipe)
        rows.append(
            row(description, base, good, scored(out, corpus))
            | {"check": checked(out, base_dir, vendor)}
        )
        print(rows[-1], flush=True)
        shutil.rmtree(out)
    if subject.bias and fnmatch(UNREACHED, only):
        rows.append(unreached(subject, work, corpus, counts))
        print(rows[-1], flush=True)
    elif UNREACHED in earlier:
        rows.append(earlier[UNREACHED])
    first = compare_runs(base, good, margin_of(None, good.header.parameters))
    return {
        "golden": subject.golden,
        "layer": LAYER,
        "export": "nvfp4_experts_only"
        + " over MXFP8" * bool(vendor)
        + f", experts {subject.layout}" * bool(subject.layout),
        "documents": len(corpus),
        "tokens": int(good.tokens.sum()),
        "tokens_of_experts": counts,
        "rows": rows,
        "good": {
            "loss": round(first.interval.delta, 5) if first.interval else None,
            "absolute": first.outcome,
            "check": checked(work / "good", base_dir, vendor),
        },
    }


def unreached(subject: Subject, work: Path, corpus: Corpus, counts: list[int]) -> dict[str, Any]:
    """Zero an expert that no token reaches: in this base and its export, the router's bias keeps
    every token from it.
    """
    expert = int(np.argmin(counts))

    def shun(_name: str, values: np.ndarray) -> bytes:
        changed = values.astype(np.float32)
        changed[expert] = -100.0
        return changed.tobytes()

    places = {name: work / f"shunned-{name}" for name in ("bf16", "vendor", "good", "damaged")}
    sources = {"bf16": "bf16"} | ({"vendor": subject.vendor} if subject.vendor else {})
    for name, source in sources.items():
        shutil.copytree(subject.folder / source, places[name])
        edit(places[name], subject.bias, shun)
    vendor = places["vendor"] if subject.vendor else None
    subject.export(places["bf16"], vendor, places["good"])
    shutil.copytree(places["good"], places["damaged"])
    edit(places["damaged"], rf"experts\.{expert}\.{subject.names[2]}\.weight_scale$", zero)
    runs = [scored(places[n], corpus) for n in ("bf16", "good", "damaged")]
    measures = row(UNREACHED, *runs)
    return measures | {"check": checked(places["damaged"], places["bf16"], vendor)}


def more_text(subject: Subject, work: Path) -> dict[str, Any]:
    """Return the drift of one damage on WikiText-2's test split."""
    corpus = load_corpus(WIKITEXT).head(WIKI_DOCUMENTS)
    folder = shutil.copytree(work / "good", work / "damaged")
    edit(folder, r"experts\.\d+\..*\.weight_scale_2$", times(17 / 16))
    runs = [scored(p, corpus) for p in (subject.folder / "bf16", work / "good", folder)]
    shutil.rmtree(folder)
    measures = row("scales of a layer's experts 1/16 too large", *runs)
    return measures | {
        "corpus": corpus.name,
        "documents": len(corpus),
        "tokens": int(runs[0].tokens.sum()),
    }


def main() -> None:
    """Damage, score, write; goldens that are not selected keep their earlier results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "damage.json")
    parser.add_argument(
        "--golden", action="append", choices=[s.golden for s in SUBJECTS], help="only these goldens"
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="GLOB",
        help="only these damages; the others keep their results",
    )
    parser.add_argument(
        "--wikitext",
        action="store_true",
        help="also score one damage of the first golden on WikiText-2",
    )
    args = parser.parse_args()
    earlier = json.loads(args.out.read_text()) if args.out.is_file() else {}
    goldens = {g["golden"]: g for g in earlier.get("goldens", [])}
    for subject in SUBJECTS:
        if args.golden and subject.golden not in args.golden:
            continue
        work = Path(tempfile.mkdtemp(prefix="ckptgate-damage-"))
        try:
            old = goldens.get(subject.golden, {})
            wikitext = old.get("more_text")
            new = examine(subject, work, args.only, old)
            if args.wikitext and subject is SUBJECTS[0]:
                wikitext = more_text(subject, work)
            goldens[subject.golden] = new | ({"more_text": wikitext} if wikitext else {})
        finally:
            shutil.rmtree(work, ignore_errors=True)
    result = {
        "command": "python benchmarks/damage.py --wikitext",
        "goldens": [goldens[s.golden] for s in SUBJECTS if s.golden in goldens],
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "numpy")},
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
