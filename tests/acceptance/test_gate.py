# SPDX-License-Identifier: Apache-2.0
"""The gate on real exports of the golden: a pass, a fail, an inconclusive; rescoring; what is
refused.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import exporter
import verifier
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.errors import ContentError, MachineError, UsageError
from verifier.evaluation import Margin
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import load_corpus
from verifier.gate.run_file import read_run
from verifier.gate.score import score_run
from verifier.manifest import Manifest, digest
from verifier.selftest.editor import CheckpointEditor

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
BF16, VENDOR, CORPUS = GOLDEN / "bf16", GOLDEN / "mxfp8", GOLDEN / "corpus.jsonl"
ONE = ["--workers", "1"]  # a worker more costs seconds of importing torch, and changes no bit
pytestmark = pytest.mark.xdist_group("gate")

OTHER_CPU = 0.01
"""Nats per token between CPUs whose BF16 products are summed in another order; 0.0023 was seen
between one with AVX-512 and one without.
"""


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return Manifest.model_validate_json((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "mixed"
    exporter.export(BF16, out, recipe="nvfp4_experts_only", onto=VENDOR)
    return out


def edit_bytes(folder: Path, change: dict[str, str]) -> None:
    """Give tensors the bytes of others of the same folder: {tensor: tensor whose bytes it gets}."""
    ckpt = open_checkpoint(folder)
    data = {n: ckpt.read(ckpt.tensors[o]).tobytes() for n, o in change.items()}
    for name, raw in data.items():
        t = ckpt.tensors[name]
        assert len(raw) == t.nbytes
        with (folder / t.file).open("r+b") as handle:
            handle.seek(t.offset)
            handle.write(raw)


def test_the_golden_is_what_its_manifest_says(manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        assert digest(GOLDEN / name) == file, name
    ckpt = open_checkpoint(BF16)
    assert (len(ckpt.tensors), ckpt.nbytes) == (manifest.tensors, manifest.bytes)
    assert manifest.notes["weights_sha256"]["bf16"] == ckpt.weights_sha256
    assert manifest.notes["lowest_expert_share"] >= 0.02
    wiki = next(
        s
        for s in manifest.scores
        if s.corpus == "wikitext2-test" and s.protocol["protocol"] == "tokens"
    )
    assert wiki.perplexity <= 150 < wiki.extra["unigram_perplexity"]
    floats = {n for n, t in ckpt.tensors.items() if t.dtype == "F32"}
    assert all(
        re.search(r"gate\.weight$|e_score_correction_bias$|patch_embedding\.weight$", n)
        for n in floats
    )
    assert len(floats) == 7
    assert sum(f.stat().st_size for f in GOLDEN.parent.rglob("*") if f.is_file()) < 25_000_000


def test_vendor_golden_is_clean() -> None:
    report = verifier.check(VENDOR, base=BF16, depth="payload")
    assert (report.verdict, report.findings) == ("passed", ())


def test_rescoring_gives_the_manifest(manifest: Manifest) -> None:
    want = next(s for s in manifest.scores if s.corpus == "corpus.jsonl")
    corpus = load_corpus(str(CORPUS))
    scored = score_run(open_checkpoint(BF16), corpus, workers=1)
    assert scored is not None
    assert scored.header.key == want.protocol
    nats, tokens = np.array(want.documents).T
    assert scored.tokens.tolist() == tokens.tolist()
    assert (np.abs(scored.sums - nats) / tokens).max() < OTHER_CPU


def test_a_good_export_passes(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["gate", str(mixed), "--base", str(BF16), "--corpus", str(CORPUS)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "default budgets by share of parameters" in text
    assert "estimates KL(base || candidate)" in text
    loss = float(re.search(r"loss\s+([+-][\d.]+) nats", text)[1])  # type: ignore[index]
    assert 0 < loss < 0.03


def test_gate_and_up_swapped_throughout_a_layer_fail(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "swapped"
    shutil.copytree(mixed, broken)
    ckpt = open_checkpoint(broken)
    layer = [
        n for n in ckpt.tensors if ".layers.2." in n and re.search(r"experts\.\d+\.w[13]\.", n)
    ]
    swap = {
        n: (n.replace(".w1.", ".w3.") if ".w1." in n else n.replace(".w3.", ".w1.")) for n in layer
    }
    edit_bytes(broken, swap)
    code = run(
        [
            "gate",
            str(broken),
            "--base",
            str(BF16),
            "--corpus",
            str(CORPUS),
            "--format",
            "json",
            *ONE,
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert (code, result["verdict"], result["outcome"]) == (1, "failed", "failed")
    assert result["interval"]["low"] > result["margin"]["nats"]
    report = verifier.check(broken, base=BF16, depth="payload")
    assert {f.rule for f in report.findings if f.severity == "error"} == {"QC511"}


def test_few_documents_and_a_margin_near_the_effect_are_inconclusive(mixed: Path) -> None:
    first = verifier.gate.run(
        mixed, base=BF16, corpus=str(CORPUS), documents=4, max_increase="8%", workers=1
    )
    assert first.interval is not None
    near = verifier.gate.run(
        mixed,
        base=BF16,
        corpus=str(CORPUS),
        documents=4,
        max_increase=max(first.interval.delta, 1e-4),
        workers=1,
    )
    assert near.outcome == "inconclusive"
    assert near.exit_code == 3
    assert not near.measures_kl or near.interval is not None


def test_logits_that_are_not_finite_fail_without_statistics(mixed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(mixed, broken)
    ckpt = open_checkpoint(broken)
    t = ckpt.tensors["language_model.model.norm.weight"]
    with (broken / t.file).open("r+b") as handle:
        handle.seek(t.offset)
        handle.write(b"\xc0\x7f")  # a BF16 NaN
    calls: list[tuple[int, int, str]] = []
    result = verifier.gate.run(
        broken,
        base=BF16,
        corpus=str(CORPUS),
        documents=2,
        workers=1,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0] == (0, 0, "loading candidate and base")
    assert calls[-1] == (2, 2, "candidate and base")
    assert (result.outcome, result.interval, result.nonfinite) == ("failed", None, [0, 1])
    assert "not finite in 2 documents" in verifier.gate.render_text(result)
    assert json.loads(verifier.gate.render_json(result))["perplexity_candidate"] is None


def test_the_candidate_is_not_the_base(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(BF16)
    for same in (BF16, shutil.copytree(BF16, tmp_path / "copy"), tmp_path / "link"):
        with pytest.raises(UsageError, match="the base itself"):
            verifier.gate.run(same, base=BF16, corpus=str(CORPUS), max_increase="8%")


def test_what_is_refused_before_a_model_is_loaded(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token ids"):
        verifier.gate.run(mixed, base=BF16, corpus=str(CORPUS), protocol="lm-eval")
    with pytest.raises(UsageError, match="at least"):
        verifier.gate.run(mixed, base=BF16, corpus=str(CORPUS), seq_len=1)
    with pytest.raises(UsageError, match="not 'words'"):
        verifier.gate.run(mixed, base=BF16, corpus=str(CORPUS), protocol="words")  # type: ignore[arg-type]
    other = shutil.copytree(mixed, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    text = tmp_path / "t.txt"
    text.write_text("one document")
    with pytest.raises(ContentError, match="different tokenizers"):
        verifier.gate.run(other, base=BF16, corpus=str(text))
    (other / "tokenizer.json").unlink()
    with pytest.raises(ContentError, match=r"no tokenizer\.json"):
        verifier.gate.run(other, base=BF16, corpus=str(text))


def test_what_a_worker_meets_reaches_the_caller(mixed: Path, tmp_path: Path) -> None:
    ids = tmp_path / "far.jsonl"
    ids.write_text('{"ids": [1, 999999]}\n')
    with pytest.raises(ContentError, match="999999"):
        verifier.gate.run(mixed, base=BF16, corpus=str(ids), workers=1)
    strange = shutil.copytree(mixed, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ContentError, match="NoSuchModel"):
        verifier.gate.run(strange, base=BF16, corpus=str(CORPUS), documents=1, workers=1)
    with pytest.raises((MachineError, ContentError)):
        verifier.gate.run(
            mixed, base=BF16, corpus=str(CORPUS), documents=1, device="nosuchdevice", workers=1
        )


def test_a_module_without_its_scale_cannot_be_scored(mixed: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(mixed, tmp_path / "noscale")
    CheckpointEditor(broken).drop(
        ["language_model.model.layers.1.self_attn.q_proj.weight_scale_inv"]
    )
    with pytest.raises(ContentError):
        verifier.gate.run(broken, base=BF16, corpus=str(CORPUS), documents=1, workers=1)


@pytest.mark.slow
def test_wikitext_by_tokens_and_by_lm_eval(
    shared_data: Path, mixed: Path, manifest: Manifest
) -> None:
    corpus = load_corpus("wikitext2-test").head(3)
    for protocol in ("tokens", "lm-eval"):
        want = next(
            s
            for s in manifest.scores
            if s.corpus == "wikitext2-test" and s.protocol["protocol"] == protocol
        )
        scored = score_run(open_checkpoint(BF16), corpus, protocol=protocol, workers=2)  # type: ignore[arg-type]
        assert scored is not None
        # The third document's last window is cut elsewhere than in the whole text.
        for i in range(2):
            nats, tokens = want.documents[i]
            assert scored.tokens[i] == tokens
            assert abs(scored.sums[i] - nats) / tokens < OTHER_CPU
    result = verifier.gate.run(mixed, base=BF16, corpus="wikitext2-test", documents=2)
    assert result.outcome == "inconclusive"  # of so few documents
    assert result.interval is not None and result.interval.high < result.margin.nats
    assert not result.measures_kl


def test_a_base_in_block_fp8_is_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many models ship in FP8 only: the source is the base, its NVFP4 export the candidate."""
    base, candidate = tmp_path / "fp8", tmp_path / "nvfp4"
    exporter.export(BF16, base, recipe="fp8_block128", engine="none")
    exporter.export(base, candidate, recipe="nvfp4_experts_only", input_scale="one")
    assert verifier.check(candidate, base=base, depth="payload").verdict == "passed"
    corpus = tmp_path / "few.jsonl"
    corpus.write_text("".join(CORPUS.read_text().splitlines(keepends=True)[:25]))
    assert (
        run(
            [
                "gate",
                str(candidate),
                "--base",
                str(base),
                "--corpus",
                str(corpus),
                "--format",
                "json",
                *ONE,
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"


@pytest.fixture(scope="session")
def runs(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the runs of the base and of a good export, each scored once."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / f"{name}.run" for name in ("base", "mixed")}
    for name, model in (("base", BF16), ("mixed", mixed)):
        assert (
            run(
                [
                    "score",
                    str(model),
                    "--corpus",
                    str(CORPUS),
                    "--top-k",
                    "32",
                    "-o",
                    str(found[name]),
                    *ONE,
                ]
            )
            == 0
        )
    return found


def test_scored_once_and_compared_later_is_the_gate(mixed: Path, runs: dict[str, Path]) -> None:
    base, ours = (read_run(runs[n]) for n in ("base", "mixed"))
    apart = compare_runs(base, ours, Margin(0.077, ""))
    together = verifier.gate.run(
        mixed, base=BF16, corpus=str(CORPUS), max_increase="0.077", workers=1
    )
    # Lockstep or apart, one worker or two: the same bits.
    assert together.documents == apart.documents
    assert together.interval == apart.interval
    exact, bound = together.measures.kl, apart.measures.kl
    assert exact is not None
    assert bound is not None
    assert (exact.kind, bound.kind.split(",")[0]) == ("lockstep", "a lower bound")
    assert 0 < bound.mean.delta < exact.mean.delta < 2 * bound.mean.delta
    assert together.measures.top1 == apart.measures.top1
    # The text was sampled from the base: two ways to one number.
    assert together.interval is not None
    assert exact.mean.delta == pytest.approx(together.interval.delta, abs=3 * together.interval.se)
    assert [(e.experts, e.unreached) for e in together.experts] == [(8, ())] * 3
    assert together.floor is not None
    assert together.floor < 1e-3


def test_a_dead_expert_fails_the_drift_margin_where_the_absolute_one_passes(
    mixed: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The busiest expert of one layer outputs zeros: its last scales are zero, byte by byte."""
    counts = read_run(runs["mixed"]).header.experts
    layer = sorted(counts)[1]
    busiest = int(np.argmax(counts[layer]))
    number = re.search(r"layers\.(\d+)\.", layer)[1]  # type: ignore[index]
    broken = shutil.copytree(mixed, tmp_path / "dead")
    ckpt = open_checkpoint(broken)
    name = next(
        n
        for n in ckpt.tensors
        if f".layers.{number}." in n and n.endswith(f".experts.{busiest}.w2.weight_scale")
    )
    t = ckpt.tensors[name]
    with (broken / t.file).open("r+b") as handle:
        handle.seek(t.offset)
        handle.write(bytes(t.nbytes))
    out = tmp_path / "dead.run"
    assert run(["score", str(broken), "--corpus", str(CORPUS), "-o", str(out), *ONE]) == 0
    assert run(["compare", str(runs["base"]), str(out)]) == 0
    capsys.readouterr()
    command = [
        "compare",
        str(runs["base"]),
        str(out),
        "--drift-against",
        str(runs["mixed"]),
        "--format",
        "json",
    ]
    assert run(command) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["drift"]["interval"]["low"] > 0.003
    assert result["interval"]["high"] < result["margin"]["nats"]
    # The same as depth eval; that the scales are zero is QC501's to tell.
    good = read_run(runs["mixed"])
    compared = compare_runs(
        read_run(runs["base"]),
        read_run(out),
        Margin(0.077, ""),
        drift_against=good,
        drift_margin=Margin(0.003, ""),
    )
    report = verifier.check(
        broken, base=BF16, depth="eval", select="QC7", evaluate=lambda *_: compared
    )
    assert {f.rule for f in report.findings if f.severity == "error"} == {"QC702"}
    assert "over the accepted run" in next(
        f.message for f in report.by_rule("QC702") if f.severity == "error"
    )


def test_check_at_depth_eval_with_activations_as_declared(
    mixed: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "check",
        str(mixed),
        "--base",
        str(BF16),
        "--depth",
        "eval",
        "--corpus",
        str(CORPUS),
        "--format",
        "json",
    ]
    command += ["--activations", "declared", "--select", "QC7"]
    assert run([*command, "--documents", "12", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["stats"]["eval"]
    assert (found["outcome"], found["key"]["activations"]) == ("passed", "declared")
    assert found["environment"]["experts"] == "ckptgate"
    assert {c["rule"]: c["checked"] for c in report["coverage"] if c["ran"]} == {
        "QC701": 1,
        "QC702": 2,  # the loss, and the KL divergence
        "QC703": 12 + 24,
        "QC704": 1,
        "QC705": len(found["key"]) + len(found["environment"]),
    }
    weights = compare_runs(read_run(runs["base"]), read_run(runs["mixed"]), Margin(0.077, ""))
    first = sum(q - b for b, q, _ in weights.documents[:12]) / sum(
        t for _, _, t in weights.documents[:12]
    )
    assert found["interval"]["delta"] > first + 0.002  # W4A4 costs more than W4A16
    # A run of other activations is refused before any model runs.
    assert run([*command, "--drift-against", str(runs["mixed"])]) == 1
    report = json.loads(capsys.readouterr().out)
    (finding,) = [f for f in report["findings"] if f["severity"] == "error"]
    assert finding["rule"] == "QC705"
    assert 'activations is null and "declared"' in finding["observed"]


def test_a_killed_run_goes_on_and_gives_the_same_bits(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "killed.run"
    part = tmp_path / "killed.run.part"
    args = [
        "score",
        str(BF16),
        "--corpus",
        str(CORPUS),
        "--top-k",
        "32",
        "-o",
        str(out),
        "--workers",
        "1",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "verifier", *args], **quiet)
    try:
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    done = part.read_bytes().count(b"\n") - 1
    assert 2 <= done < 11
    said: list[str] = []
    again = score_run(
        open_checkpoint(BF16),
        load_corpus(str(CORPUS)),
        top_k=32,
        journal=part,
        workers=2,
        say=said.append,
    )
    finished, of = re.findall(r"(\d+) of (\d+) units are done", said[0])[0]
    assert done <= int(finished) < int(of) == 11
    whole = read_run(runs["base"])
    assert all(np.array_equal(again.arrays[k], v) for k, v in whole.arrays.items())
    assert (again.header.experts, again.header.floor) == (whole.header.experts, whole.header.floor)


def test_two_torchrun_ranks_give_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "ranks.run"
    args = ["score", str(BF16), "--corpus", str(CORPUS), "--top-k", "32", "-o", str(out)]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "verifier",
    ]
    done = subprocess.run(
        [*launch, *args], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found, whole = read_run(out), read_run(runs["base"])
    assert all(np.array_equal(found.arrays[k], v) for k, v in whole.arrays.items())
    assert found.header.experts == whole.header.experts
    assert [p.name for p in tmp_path.iterdir()] == ["ranks.run"]


def test_attempts_are_remembered_and_not_drawn_again(mixed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rows = CORPUS.read_text().splitlines(keepends=True)
    few, part = tmp_path / "few.jsonl", tmp_path / "part.jsonl"
    few.write_text("".join(rows[1:5]))
    part.write_text("".join(rows[3:7]))
    said: list[str] = []

    def gate(corpus: Path, **options: str) -> verifier.gate.GateResult:
        return verifier.gate.run(
            mixed,
            base=BF16,
            corpus=str(corpus),
            max_increase="0.008",
            cache=cache,
            say=said.append,
            workers=1,
            **options,  # type: ignore[arg-type]
        )

    first = gate(few)
    assert (first.outcome, first.looks) == ("inconclusive", 1)
    again = gate(few)
    assert (again.looks, again.documents) == (1, first.documents)
    assert any("taken from the cache" in s for s in said)
    with pytest.raises(
        UsageError, match=r"inconclusive on 'few\.jsonl', and 2 of those 4 documents"
    ):
        gate(part)
    found = verifier.gate.plan(mixed, base=BF16, corpus=str(CORPUS), cache=cache)
    assert found.source == "the last attempt on this base (4 documents of 'few.jsonl')"
    assert found.documents == 72


def test_a_plan_scores_ten_documents(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["gate", str(mixed), "--base", str(BF16), "--corpus", str(CORPUS), "--plan", *ONE]) == 0
    )
    text = capsys.readouterr().out
    assert "the first 10 documents, scored now" in text
    assert "published normal of the format, +0.06420 nats" in text


def test_what_score_and_gate_refuse(mixed: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    assert run(["score", str(BF16), "--corpus", str(CORPUS), "-o", str(runs["base"])]) == 2
    assert run(["score", str(BF16), "--corpus", str(CORPUS), "-o", str(tmp_path)]) == 2
    gate = ["gate", str(mixed), "--base", str(BF16), "--corpus", str(CORPUS)]
    assert run([*gate, "--kl", "lockstep", "--cache", str(tmp_path)]) == 2
    assert run([*gate, "--max-drift", "0.1"]) == 2
    assert run([*gate, "--drift-against", str(tmp_path / "absent.run")]) == 2
    other = runs["mixed"]
    assert run([*gate, "--documents", "3", "--drift-against", str(other)]) == 1
