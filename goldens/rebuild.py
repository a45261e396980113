# SPDX-License-Identifier: Apache-2.0
"""Rebuild every export of every golden and compare it with its accepted record in
``goldens/records``.

    python -m goldens.rebuild [--only 'qwen3-moe-tiny.*'] [--write | --results]

An export is checked (depth payload, with its base), scored on the golden's own corpus, and compared
with its record: the digest of all tensors, the headers, the statistics of the scales, the sums of
each document. With the versions in the record the bytes must be equal; with others the drift must
be within the record's margin, and the output says which it was. ``--write`` writes a pending record
where one disagrees (`ckptgate goldens review|accept -d goldens/records`). ``--results`` builds
nothing: it writes ``goldens/results.json``, from which docs/goldens.md is rendered, from the
accepted records.

Exit 0: all agree. 1: one does not. 3: one is inconclusive.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import exporter
import verifier
from exporter.exporting import EngineChoice
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import PlanError
from verifier.evaluation import GateResult
from verifier.gate import Run, compare_runs, load_corpus, margin_of, score_run
from verifier.gate.statistics import paired
from verifier.goldens import Golden, GoldenComparison, Pending, compare, golden_of, store
from verifier.history.record import now
from verifier.inspect.stats import bins, shares, stats

HERE = Path(__file__).resolve().parent
RECORDS, RESULTS = HERE / "records", HERE / "results.json"
BASE, VENDOR, CORPUS = "bf16", "mxfp8", "corpus.jsonl"
TOP_K = 64
"""How many top tokens the KL divergence in a record is computed from."""
MADE_WITH = ("torch", "transformers", "numpy")
"""The packages whose version may change bytes or sums."""


@dataclass(frozen=True)
class Build:
    """One export: a recipe applied to the BF16 golden, or onto the vendor's checkpoint; or another
    build that is ``merged`` onto the vendor's. ``engine``: as for `exporter.export`.
    """

    name: str
    recipe: str = ""
    onto: bool = False
    merged: str = ""
    engine: EngineChoice | None = None

    def command(self, golden: str) -> str:
        """Return the command that makes it."""
        g = f"goldens/{golden}"
        if self.name == "vendor_mxfp8":
            return f"python {g}/make_vendor.py {g}/{BASE} OUT"
        if self.merged:
            return f"ckptgate merge OUT.{self.merged} OUT --onto {g}/{VENDOR}"
        how = f"--onto {g}/{VENDOR}" if self.onto else "--input-scale one"
        recipe = f"goldens/recipes/{self.recipe}" if self.recipe.endswith(".yaml") else self.recipe
        engine = f" --for {self.engine}" if self.engine else ""
        return f"ckptgate export {g}/{BASE} OUT --recipe {recipe} {how}{engine}"

    def run(self, folder: Path, out: Path) -> None:
        """Make the export of a golden; a merged one needs the other build next to ``out``."""
        if self.name == "vendor_mxfp8":
            subprocess.run(
                [sys.executable, str(folder / "make_vendor.py"), str(folder / BASE), str(out)],
                check=True,
            )
        elif self.merged:
            exporter.merge(out.with_name(f"{folder.name}.{self.merged}"), out, onto=folder / VENDOR)
        else:
            recipe = (
                HERE / "recipes" / self.recipe if self.recipe.endswith(".yaml") else self.recipe
            )
            onto = folder / VENDOR if self.onto else None
            exporter.export(
                folder / BASE,
                out,
                recipe=recipe,
                onto=onto,
                input_scale=None if onto else "one",
                engine=self.engine,
            )


PLAIN = (
    Build("mxfp8", "mxfp8_default"),
    Build("nvfp4_experts", "nvfp4_experts_only"),
    Build("nvfp4_experts_mse", "nvfp4_experts_only_mse"),
    Build("nvfp4_default", "nvfp4_default"),
    Build("nvfp4_default_mse", "nvfp4_default_mse.yaml"),
    Build("fp8_default", "fp8_default"),
)
MIXED = (
    Build("vendor_mxfp8"),
    Build("mixed", "nvfp4_experts_only", onto=True),
    Build("mixed_mse", "nvfp4_experts_only_mse", onto=True),
    Build("merged", merged="nvfp4_experts"),
)
GOLDENS = {
    "minimax-m3-tiny": (*PLAIN, *MIXED),
    "qwen3-moe-tiny": PLAIN,
    # vLLM loads none of them: its gpt-oss loader knows MXFP4 and Quark's forms.
    "gpt-oss-tiny": tuple(replace(build, engine="none") for build in PLAIN),
}


@dataclass(frozen=True)
class Rebuilt:
    """The result of a build: an exit code, a sentence, and a record that waits for review."""

    name: str
    code: int
    sentence: str
    pending: Pending | None = None


def scale_facts(folder: Path) -> dict[str, int | float | str]:
    """Return the statistics of an export's scales: counts by power of two and of special values,
    and the ends of float32 scales.
    """
    facts: dict[str, int | float | str] = {}
    statistics = stats(folder, depth="payload")
    for codes in statistics.codes:
        place = f"scales.{codes.format}.{codes.leaf}"
        facts |= {f"{place}.{k}": n for k, n in shares(codes.counts, codes.kind).items()}
        powers = [b for b in bins(codes.counts, codes.kind) if b[0].startswith("2^")]
        facts |= {f"{place}.{label}": n for label, n in powers}
    for f in statistics.floats:
        place = f"scales.{f.format}.{f.leaf}.{f.role}"
        facts |= {f"{place}.count": f.count, f"{place}.distinct": f.distinct}
        facts |= {f"{place}.{k}": v for k, v in (("low", f.low), ("high", f.high)) if v is not None}
    return facts


def record_of(result: GateResult, candidate: Checkpoint, base: Checkpoint) -> Golden:
    """Return the record of a gate's result, with the digests and the statistics of the scales of
    its candidate.
    """
    new = golden_of(result)
    made_with = {package: version(package).partition("+")[0] for package in MADE_WITH}
    facts = {
        "weights_sha256": candidate.weights_sha256,
        "base_weights_sha256": base.weights_sha256,
        "tensors": len(candidate.tensors),
        "bytes": candidate.nbytes,
        **scale_facts(Path(candidate.uri)),
    }
    return new.model_copy(update={"facts": facts, "versions": {**new.versions, **made_with}})


def compare_rebuilt(old: Golden | None, new: Golden) -> GoldenComparison:
    """Compare a rebuilt export with its record: bytes, headers, scales, then the drift.

    The sentence says which are equal.
    """
    drift = compare(old, new)
    if old is None:
        return drift
    changed = [p for p in MADE_WITH if old.versions.get(p) != new.versions.get(p)]
    versions = [f"{p} {old.versions.get(p)} → {new.versions.get(p)}" for p in changed]
    where = f"other versions ({', '.join(versions)})" if changed else "the same versions"
    if old.facts.get("base_weights_sha256") != new.facts["base_weights_sha256"]:
        return GoldenComparison("changed", f"the record has a different base; {drift.sentence}")
    if old.checkpoint.get("header_sha256") != new.checkpoint.get("header_sha256"):
        return GoldenComparison(
            "changed", f"names, dtypes or shapes of tensors changed; {drift.sentence}"
        )
    if old.facts.get("weights_sha256") == new.facts["weights_sha256"]:
        return _with_equal_bytes(drift, where, other_versions=bool(changed))
    scales = sorted(
        name
        for name in {*old.facts, *new.facts}
        if name.startswith("scales.") and old.facts.get(name) != new.facts.get(name)
    )
    statistics = "the statistics of the scales are equal"
    if scales:
        statistics = f"{len(scales)} statistics of scales differ, {scales[0]} first"
    sentence = f"bytes differ with {where}; {statistics}; {drift.sentence}"
    outcome = "changed" if drift.exit_code == 0 and not changed else drift.outcome
    return GoldenComparison(outcome, sentence, drift.interval)


def _with_equal_bytes(
    drift: GoldenComparison, where: str, *, other_versions: bool
) -> GoldenComparison:
    interval = drift.interval
    if drift.outcome == "stale" and other_versions and interval is not None:
        # The scorer changed, not the export: the record is not stale.
        ends = f"[{interval.low:+.6f}, {interval.high:+.6f}]"
        cause = f"drift {interval.delta:+.6f} nats per token {ends} is from the versions"
        return GoldenComparison("within", f"bytes equal with {where}; {cause}", interval)
    return GoldenComparison(drift.outcome, f"bytes equal with {where}; {drift.sentence}", interval)


def row_of(build: Build, golden: str, base: Checkpoint) -> dict[str, Any]:
    """Return an export's row of the results file: its accepted record, or why there is none."""
    name = f"{golden}.{build.name}"
    row = {"format": build.name, "command": build.command(golden)}
    if store.digest_of(RECORDS, name) is None:
        with tempfile.TemporaryDirectory(prefix="ckptgate-goldens-") as work:
            try:
                build.run(HERE / golden, Path(work) / name)
            except PlanError as error:
                return row | {"refused": str(error)}
        raise SystemExit(
            f"{name}: no accepted record; run python -m goldens.rebuild --write, review, accept"
        )
    g = store.load(RECORDS, name)
    base_nats, nats, tokens = zip(*g.documents, strict=True)
    loss = paired(base_nats, nats, tokens)
    formats = {k.split(".")[1] for k in g.facts if k.startswith("scales.")}
    # Records of version 0.1 do not have their margin, which was that of the widest format.
    widest = max(margin_of(None, [name]).nats for name in formats)
    margin = g.margin if g.margin is not None else widest
    counts = {
        k.removeprefix("scales."): v
        for k, v in g.facts.items()
        if k.endswith((".total", ".floor", ".zero"))
    }
    return row | {
        "loss": g.loss,
        "low": g.low,
        "high": g.high,
        "se": loss.se,
        "kl": sum(g.kl) / loss.tokens if g.kl else None,
        "documents": len(g.documents),
        "tokens": loss.tokens,
        "margin": margin,
        "verdict": g.verdict,
        "perplexity": math.exp(sum(nats) / loss.tokens),
        "bytes": g.facts["bytes"],
        "share_of_base": round(int(g.facts["bytes"]) / base.nbytes, 4),
        "scales": counts,
        "weights_sha256": g.facts["weights_sha256"],
    }


class Rebuilder:
    """Builds the exports of one golden in the working directory; the base is scored once, on first
    use.
    """

    def __init__(self, golden: str, workers: int | None) -> None:
        self.golden, self.folder, self.workers = golden, HERE / golden, workers
        self.base = open_checkpoint(self.folder / BASE)
        self.corpus = load_corpus(str(self.folder / CORPUS))
        self._base_run: Run | None = None

    def score(self, ckpt: Checkpoint) -> Run:
        """Score a checkpoint on the golden's corpus."""
        run = score_run(ckpt, self.corpus, workers=self.workers, top_k=TOP_K)
        if run is None:
            raise SystemExit("no run")
        return run

    def rebuild(self, build: Build, records: Path) -> Rebuilt:
        """Build one export in the working directory, check it, score it, and compare it with its
        record.
        """
        name = f"{self.golden}.{build.name}"
        old = store.load(records, name) if store.digest_of(records, name) is not None else None
        try:
            build.run(self.folder, Path(name))
        except PlanError as error:
            refused = f"export refuses it: {error}"
            if old is not None:
                return Rebuilt(name, 1, f"there is an accepted record, but {refused}")
            return Rebuilt(name, 0, refused)
        merged = self.folder / VENDOR if build.onto or build.merged else None
        report = verifier.check(name, base=self.folder / BASE, merged_from=merged, depth="payload")
        if report.verdict != "passed":
            rules = ", ".join(sorted({f.rule for f in report.findings}))
            return Rebuilt(name, 1, f"the check's verdict is {report.verdict} ({rules})")
        if self._base_run is None:
            self._base_run = self.score(self.base)
        ckpt = open_checkpoint(name)
        run = self.score(ckpt)
        result = compare_runs(self._base_run, run, margin_of(None, run.header.parameters))
        new = record_of(result, ckpt, self.base)
        comparison = compare_rebuilt(old, new)
        pending = None
        if old is not None and not old.kl:
            sentence = f"{comparison.sentence}; the record has no KL divergence"
            comparison = replace(comparison, sentence=sentence)
        if comparison.outcome not in ("agrees", "within") or (old is not None and not old.kl):
            pending = Pending(
                proposed=new,
                against=store.digest_of(records, name),
                outcome=comparison.outcome,
                sentence=comparison.sentence[:2000],
                time=now(),
            )
        return Rebuilt(name, comparison.exit_code, comparison.sentence, pending)


def results() -> dict[str, Any]:
    """Return the contents of the results file."""
    goldens: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for golden, builds in GOLDENS.items():
        manifest = json.loads((HERE / golden / "manifest.json").read_text(encoding="utf-8"))
        own, wiki = manifest["scores"][
            :2
        ]  # the corpus that it wrote, and WikiText-2's test split by tokens
        train, base = manifest["options"]["train"], open_checkpoint(HERE / golden / BASE)
        goldens[golden] = {
            "parameters": train["parameters"],
            "training_seconds": round(train["seconds"]),
            "steps": int(train["args"]["steps"]),
            "perplexity": own["perplexity"],
            "wikitext_perplexity": wiki["perplexity"],
            "unigram_perplexity": wiki["extra"]["unigram_perplexity"],
            "lowest_expert_share": manifest["notes"]["lowest_expert_share"],
            "formats": [row_of(b, golden, base) for b in builds],
        }
        for name in (n for n in store.names(RECORDS, store.ACCEPTED) if n.startswith(golden)):
            versions |= {
                p: str(v) for p, v in store.load(RECORDS, name).versions.items() if p in MADE_WITH
            }
    return {
        "command": "python -m goldens.rebuild --results",
        "goldens": goldens,
        "versions": versions,
    }


def unreferenced(only: str, records: Path) -> list[str]:
    """Return the accepted records without a build."""
    builds = {f"{golden}.{b.name}" for golden, group in GOLDENS.items() for b in group}
    return [
        n
        for n in store.names(records, store.ACCEPTED)
        if n not in builds and fnmatch.fnmatchcase(n, only)
    ]


def builds_matching(only: str) -> dict[str, list[Build]]:
    """Return the builds whose name matches, and those that they are merged from, by golden."""
    selected: dict[str, list[Build]] = {}
    for golden, group in GOLDENS.items():
        chosen = {b.name for b in group if fnmatch.fnmatchcase(f"{golden}.{b.name}", only)}
        chosen |= {b.merged for b in group if b.name in chosen and b.merged}
        if chosen:
            selected[golden] = [b for b in group if b.name in chosen]
    return selected


def main() -> int:
    """Rebuild, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="of GOLDEN.FORMAT")
    parser.add_argument("--write", action="store_true", help="write pending records")
    parser.add_argument(
        "--results", action="store_true", help="write the results file from the accepted records"
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--workers", type=int, help="scoring processes")
    parser.add_argument("--out", type=Path, help="keep the exports here")
    args = parser.parse_args()
    if args.results:
        RESULTS.write_text(json.dumps(results(), indent=1) + "\n", encoding="utf-8")
        return 0
    builds = builds_matching(args.only)
    if not builds:
        raise SystemExit(f"{args.only!r} matches no export")
    records = args.records.resolve()
    work = args.out.resolve() if args.out else Path(tempfile.mkdtemp(prefix="ckptgate-goldens-"))
    work.mkdir(exist_ok=True)
    codes: list[int] = []
    try:
        # A record has the path that was scored: a name in the working directory, the same on every
        # machine.
        with contextlib.chdir(work):
            for golden, group in builds.items():
                rebuilder = Rebuilder(golden, args.workers)
                for build in group:
                    r = rebuilder.rebuild(build, records)
                    codes.append(r.code)
                    status = "ok" if r.code == 0 else "FAILED"
                    print(f"{status:6} {r.name}: {r.sentence}", flush=True)
                    if args.write and r.pending is not None:
                        store.write_pending(records, r.name, r.pending)
    finally:
        if args.out is None:
            shutil.rmtree(work, ignore_errors=True)
    for name in unreferenced(args.only, records):
        codes.append(1)
        print(f"FAILED {name}: a record without an export; `ckptgate goldens prune` deletes it")
    good = codes.count(0)
    print(f"{good} of {len(codes)} as accepted")
    return 1 if 1 in codes or 4 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
