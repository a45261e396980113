# SPDX-License-Identifier: Apache-2.0
"""Damage exports of the goldens in known ways, and measure what the gate's measures and the check
detect.

    python benchmarks/damage.py [--golden minimax-m3-tiny]

Bytes of a real export are edited; each damaged copy is scored on the golden's own corpus and on
WikiText-2's test split, and compared with the base (absolute margin, the default budget) and with
the undamaged export (by the loss and by the KL ratio, default margins), and checked at depth
payload against the base; so are two better exports. What the results file has already is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import exporter
import verifier
from verifier.checkpoint import open_checkpoint
from verifier.gate import Run, compare_runs, drift_margin_of, load_corpus, margin_of
from verifier.gate.corpora import WIKITEXT, Corpus, documents_digest
from verifier.gate.decision import kl_margin_of, kl_ratio_of
from verifier.gate.jobs import UnitScores
from verifier.gate.options import ScoringOptions
from verifier.gate.score import JobScores, run_of
from verifier.gate.scorers.transformers import score
from verifier.gate.windows import plan_scoring
from verifier.selftest.editor import CheckpointEditor

ROOT = Path(__file__).parents[1]
LAYER = 2
WIKI_CHARACTERS = 1_250
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
    """Score a checkpoint in this process; a process of its own would import torch each time."""
    checkpoint = open_checkpoint(folder)
    options = ScoringOptions(corpus, top_k=64)
    plan = plan_scoring([checkpoint], options)
    scores: list[UnitScores] = []
    units = (*plan.units, *plan.floor_units)
    environment = score(replace(options.job(checkpoint.uri), units=units), scores.append)
    return run_of(plan, checkpoint, JobScores({s.unit: s for s in scores}, environment), 0.0)


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


@dataclass(frozen=True)
class Text:
    """A corpus, and what the base and the undamaged export score on it."""

    corpus: Corpus
    base: Run
    good: Run

    @classmethod
    def scored(cls, corpus: Corpus, base: Path, good: Path) -> Text:
        """Score the base and the undamaged export."""
        return cls(corpus, scored(base, corpus), scored(good, corpus))

    def row(self, damage: str, folder: Path) -> dict[str, Any]:
        """Return each measure of a damaged export."""
        return row(damage, self.base, self.good, scored(folder, self.corpus))

    def undamaged(self) -> dict[str, Any]:
        """Return the size of the corpus, and the loss of the undamaged export."""
        first = compare_runs(self.base, self.good, margin_of(None, self.good.header.parameters))
        good = {
            "loss": round(first.interval.delta, 5) if first.interval else None,
            "absolute": first.outcome,
        }
        tokens = int(self.good.tokens.sum())
        return {"documents": len(self.corpus), "tokens": tokens, "good": good}


def wikitext() -> Corpus:
    """Return the start of each document of WikiText-2's test split."""
    corpus = load_corpus(WIKITEXT)
    texts = tuple(text[:WIKI_CHARACTERS] for text in corpus.texts)
    name = f"{corpus.name}, the first {WIKI_CHARACTERS:,} characters of each document"
    return replace(corpus, name=name, digest=documents_digest(texts), texts=texts)


def exports(
    subject: Subject, vendor: Path | None, good: Path, run: Run
) -> dict[str, Callable[[Path], None]]:
    """Return functions that write an export into a folder, by description: damaged copies, and
    better exports.
    """
    counts = {
        int(n.partition("layers.")[2].partition(".")[0]): c for n, c in run.header.experts.items()
    }

    def copied(damage: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda folder: damage(shutil.copytree(good, folder))

    def exported(recipe: str) -> Callable[[Path], None]:
        return lambda folder: subject.export(subject.folder / "bf16", vendor, folder, recipe)

    broken = damages(subject, counts[LAYER], sorted(counts))
    return {name: copied(damage) for name, damage in broken.items()} | {
        name: exported(recipe) for name, recipe in OTHERS.items()
    }


def examine(subject: Subject, work: Path, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Damage, score and check one golden's export, and yield the results after each damage; rows of
    earlier results are kept.
    """
    base = subject.folder / "bf16"
    vendor = subject.folder / subject.vendor if subject.vendor else None
    good = work / "good"
    subject.export(base, vendor, good)
    own = Text.scored(load_corpus(str(subject.folder / "corpus.jsonl")), base, good)
    wiki = Text.scored(wikitext(), base, good)
    rows = {r["damage"]: r for r in before.get("rows", [])}
    on_wiki = {r["damage"]: r for r in before.get("wikitext", {}).get("rows", [])}
    formats = "nvfp4_experts_only" + " over MXFP8" * bool(vendor)

    sizes = own.undamaged()
    sizes["good"]["check"] = checked(good, base, vendor)
    head = {
        "golden": subject.golden,
        "layer": LAYER,
        "export": formats + f", experts {subject.layout}" * bool(subject.layout),
        **sizes,
    }
    wiki_head = {"corpus": wiki.corpus.name, **wiki.undamaged()}

    def result() -> dict[str, Any]:
        more = wiki_head | {"rows": list(on_wiki.values())}
        return head | {"rows": list(rows.values()), "wikitext": more}

    for description, write in exports(subject, vendor, good, own.good).items():
        if description in rows and description in on_wiki:
            continue
        folder = work / "damaged"
        write(folder)
        if description not in rows:
            rules = checked(folder, base, vendor)
            rows[description] = own.row(description, folder) | {"check": rules}
        if description not in on_wiki:
            on_wiki[description] = wiki.row(description, folder)
        print(rows[description], on_wiki[description], flush=True)
        shutil.rmtree(folder)
        yield result()
    if subject.bias and UNREACHED not in rows:
        counts = next(c for n, c in own.good.header.experts.items() if f"layers.{LAYER}." in n)
        rows[UNREACHED] = unreached(subject, work, own.corpus, counts)
        print(rows[UNREACHED], flush=True)
        yield result()


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


def main() -> None:
    """Damage, score, write after each damage; goldens that are not selected keep their earlier
    results.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "damage.json")
    parser.add_argument(
        "--golden", action="append", choices=[s.golden for s in SUBJECTS], help="only these goldens"
    )
    args = parser.parse_args()
    earlier = json.loads(args.out.read_text()) if args.out.is_file() else {}
    goldens = {g["golden"]: g for g in earlier.get("goldens", [])}
    for subject in SUBJECTS:
        if args.golden and subject.golden not in args.golden:
            continue
        before = goldens.get(subject.golden, {})
        with tempfile.TemporaryDirectory(prefix="ckptgate-damage-") as work:
            for result in examine(subject, Path(work), before):
                goldens[subject.golden] = result
                write_results(
                    args.out, [goldens[s.golden] for s in SUBJECTS if s.golden in goldens]
                )


def write_results(file: Path, goldens: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    result = {
        "command": "python benchmarks/damage.py",
        "goldens": goldens,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "numpy")},
        },
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
