# SPDX-License-Identifier: Apache-2.0
"""The goldens of further families: what they are, an export compared with its accepted record,
records without an export.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import exporter
from goldens import rebuild
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.goldens import store
from verifier.manifest import Manifest, digest

GOLDENS = ROOT / "goldens"
QWEN = GOLDENS / "qwen3-moe-tiny"
NAME = "qwen3-moe-tiny.nvfp4_experts"
pytestmark = pytest.mark.xdist_group("goldens")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the NVFP4 export of the Qwen3-MoE golden."""
    out = tmp_path_factory.mktemp("goldens") / "experts"
    exporter.export(QWEN / "bf16", out, recipe="nvfp4_experts_only", input_scale="one")
    return out


@pytest.mark.parametrize("name", [n for n in rebuild.GOLDENS if n != "minimax-m3-tiny"])
def test_a_golden_is_what_its_manifest_says(name: str) -> None:
    folder = GOLDENS / name
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    assert set(manifest.files) == {
        str(p.relative_to(folder)) for p in (folder / "bf16").iterdir()
    } | {"corpus.jsonl"}
    for file, wanted in manifest.files.items():
        assert digest(folder / file) == wanted, file
    ckpt = open_checkpoint(folder / "bf16")
    assert (len(ckpt.tensors), ckpt.nbytes) == (manifest.tensors, manifest.bytes)
    assert manifest.notes["weights_sha256"]["bf16"] == ckpt.weights_sha256
    assert manifest.notes["lowest_expert_share"] > 0
    wiki = next(
        s
        for s in manifest.scores
        if s.corpus == "wikitext2-test" and s.protocol["protocol"] == "tokens"
    )
    assert 3 * wiki.perplexity < wiki.extra["unigram_perplexity"]
    assert (
        json.loads((folder / "corpus.jsonl").read_text().split("\n", 1)[0])["sampled_from"]
        == ckpt.weights_sha256
    )


def test_an_export_passes_check_and_gate(
    experts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["check", str(experts), "--base", str(QWEN / "bf16"), "--depth", "payload"]) == 0
    few = tmp_path / "few.jsonl"
    few.write_text("".join((QWEN / "corpus.jsonl").read_text().splitlines(keepends=True)[:13]))
    capsys.readouterr()
    code = run(
        [
            "gate",
            str(experts),
            "--base",
            str(QWEN / "bf16"),
            "--corpus",
            str(few),
            "--format",
            "json",
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert (code, result["verdict"], len(result["documents"])) == (0, "passed", 12)
    assert 0 < result["interval"]["delta"] < result["margin"]["nats"]
    assert {e["experts"] for e in result["experts"]} == {16}
    assert not any(e["unreached"] for e in result["experts"])


def test_the_bytes_are_those_of_the_accepted_record(experts: Path) -> None:
    old = store.load(rebuild.RECORDS, NAME)
    ckpt = open_checkpoint(experts)
    assert len(ckpt.tensors) == old.facts["tensors"]
    if all(version(p).partition("+")[0] == old.versions[p] for p in rebuild.MADE_WITH):
        scales = {k: v for k, v in old.facts.items() if k.startswith("scales.")}
        assert rebuild.scale_facts(experts) == scales
        assert ckpt.weights_sha256 == old.facts["weights_sha256"]


def test_every_record_has_an_export_and_every_export_a_record_or_a_reason() -> None:
    results = json.loads(rebuild.RESULTS.read_text())["goldens"]
    assert rebuild.unreferenced("*", rebuild.RECORDS) == []
    for golden, builds in rebuild.GOLDENS.items():
        rows = {r["format"]: r for r in results[golden]["formats"]}
        assert list(rows) == [b.name for b in builds]
        for build in builds:
            name, row = f"{golden}.{build.name}", rows[build.name]
            if "refused" in row:
                assert store.digest_of(rebuild.RECORDS, name) is None
                continue
            record = store.load(rebuild.RECORDS, name)
            assert record.accepted is not None
            assert record.facts["weights_sha256"] == row["weights_sha256"]
            assert record.loss == row["loss"]
            assert row["command"] == build.command(golden)


def test_a_rebuilt_export_is_told_from_its_record() -> None:
    old = store.load(rebuild.RECORDS, NAME)
    same = rebuild.compare_rebuilt(old, old)
    assert (same.exit_code, same.sentence.startswith("bytes equal with the same versions; ")) == (
        0,
        True,
    )
    newer = old.model_copy(update={"versions": {**old.versions, "torch": "99.0"}})
    assert "with other versions (torch" in rebuild.compare_rebuilt(old, newer).sentence
    bytes_ = {**old.facts, "weights_sha256": "0" * 64}
    assert rebuild.compare_rebuilt(old, old.model_copy(update={"facts": bytes_})).exit_code == 1
    assert rebuild.compare_rebuilt(old, newer.model_copy(update={"facts": bytes_})).exit_code == 0
    header = {**old.checkpoint, "header_sha256": "0" * 64}
    assert (
        rebuild.compare_rebuilt(old, newer.model_copy(update={"checkpoint": header})).outcome
        == "changed"
    )
    for factor, outcome in ((1.3, "worse"), (1.1, "within"), (0.7, "stale")):
        divergences = {"kl": [factor * kl for kl in old.kl], "documents": old.documents[:]}
        divergences["documents"][0] = (1.0, 1.0, old.documents[0][2])
        changed = old.model_copy(update=divergences)
        assert rebuild.compare_rebuilt(old, changed).outcome == outcome
    # Without divergences: a drift of 0.01 nats per token, not the same in every document.
    old, newer = (golden.model_copy(update={"kl": []}) for golden in (old, newer))
    noise = np.random.default_rng(7).normal(0.01, 0.002, len(old.documents))
    worse = [(b, q + float(d) * t, t) for (b, q, t), d in zip(old.documents, noise, strict=True)]
    drifted = rebuild.compare_rebuilt(
        old, newer.model_copy(update={"documents": worse, "facts": bytes_})
    )
    assert (drifted.outcome, drifted.exit_code) == ("worse", 1)
    assert "bytes differ with other versions" in drifted.sentence
    better = {
        "documents": [
            (b, q - float(d) * t, t) for (b, q, t), d in zip(old.documents, noise, strict=True)
        ]
    }
    assert rebuild.compare_rebuilt(old, old.model_copy(update=better)).outcome == "stale"
    elsewhere = rebuild.compare_rebuilt(old, newer.model_copy(update=better))
    assert (elsewhere.outcome, "is from the versions" in elsewhere.sentence) == (
        "within",
        True,
    )
