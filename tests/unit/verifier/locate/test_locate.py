# SPDX-License-Identifier: Apache-2.0
"""Damage is located: the damaged module of the damaged layer is blamed, a sound export is not, and
layers that run one by one compute what the whole model does.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

import exporter
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.gate import load_corpus, write_run
from verifier.gate.jobs import UnitScores
from verifier.gate.options import ScoringOptions
from verifier.gate.score import JobScores, run_of
from verifier.gate.scorers.transformers import score
from verifier.gate.windows import plan_scoring
from verifier.load.model import load_model
from verifier.locate import LocateOptions, locate
from verifier.locate.page import render_page
from verifier.locate.render import place, render_text, value_of
from verifier.locate.stream import StreamedModel
from verifier.selftest.editor import CheckpointEditor

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = ROOT / "goldens" / "qwen3-moe-tiny"
BASE = GOLDEN / "bf16"
SCHEMA = ROOT / "verifier" / "report" / "schemas" / "locate-1.0.json"
DOCUMENTS, TOKENS = 9, 24
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (GOLDEN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    documents = [row["ids"][:TOKENS] for row in rows if "ids" in row][:DOCUMENTS]
    file = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in documents))
    return file


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "nvfp4"
    exporter.export(BASE, out, recipe="nvfp4_experts_only", input_scale="one", engine="none")
    return out


def located(candidate: Path, corpus: Path, capsys: Capture, *options: str) -> tuple[int, Any]:
    argv = ["locate", str(candidate), "--base", str(BASE), "--corpus", str(corpus)]
    code = run([*argv, *options, "--format", "json"])
    value = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(value)
    return code, value


def test_a_sound_export_blames_nothing(
    export: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "page.html"
    code, value = located(export, corpus, capsys, "-o", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "99% bounds" in text
    assert "two-sided 90%" not in text
    assert code == 0
    assert value["verdict"] == "passed"
    assert value["blamed"] == []
    assert value["kl"] > 0
    experts = [m for m in value["modules"] if m["module"] == "experts"]
    assert all(19 < m["sqnr"] < 22 and 19 < m["inputs_sqnr"] < 22 for m in experts)
    assert all(0.5 < layer["router_agreement"] <= 1 for layer in value["layers"][1:-1])


def test_the_damaged_module_is_blamed(
    export: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(export, tmp_path / "damaged")
    editor = CheckpointEditor(folder)
    for name in editor.tensors():
        if ".layers.1." in name and name.endswith("weight_scale_2"):
            editor.store(name, (editor.array(name) * np.float32(1.5)).astype(np.float32))
    result = locate(folder, BASE, LocateOptions(load_corpus(str(corpus)), scratch=tmp_path))
    assert result.exit_code == 1
    assert [place(blame) for blame in result.blames] == ["layer 1 experts"]
    assert result.explained > 0.99  # putting it back gives the sound export
    assert 1.5 < result.cost <= 3
    (command, *_) = result.blames[0].commands
    assert "layers.1.mlp.experts" in command
    assert run(command.split()[1:]) == 0
    capsys.readouterr()
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(value_of(result))
    assert "verdict: FAILED (layer 1 experts: 100%" in render_text(result)
    page = render_page(result)
    assert 'class="failed" fill-opacity="1.00"><title>layer 1 experts: +' in page
    assert page.count('class="failed" fill-opacity="1.00"') == 2  # the cell and the legend


def test_an_accepted_run_is_the_reference(export: Path, corpus: Path, tmp_path: Path) -> None:
    checkpoint, scores = open_checkpoint(export), list[UnitScores]()
    options = ScoringOptions(load_corpus(str(corpus)), top_k=64)
    plan = plan_scoring([checkpoint], options)
    environment = score(replace(options.job(str(export)), units=plan.units), scores.append)
    accepted = run_of(plan, checkpoint, JobScores({s.unit: s for s in scores}, environment), 0.0)
    write_run(tmp_path / "accepted.run", accepted)
    asked = LocateOptions(options.corpus, drift_against=tmp_path / "accepted.run")
    assert locate(export, BASE, asked).exit_code == 0
    folder = shutil.copytree(export, tmp_path / "damaged")
    editor = CheckpointEditor(folder)
    for name in editor.tensors():
        if ".layers.2." in name and name.endswith("weight_scale_2"):
            editor.store(name, (editor.array(name) * np.float32(1.5)).astype(np.float32))
    result = locate(folder, BASE, asked)
    assert result.exit_code == 1
    assert "the accepted run of" in result.source
    assert place(result.blames[0]) == "layer 2 experts"
    assert result.cost <= 3


def test_a_damaged_router_is_blamed(
    export: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(export, tmp_path / "damaged")
    name = "model.layers.3.mlp.gate.weight"
    editor = CheckpointEditor(folder)
    editor.store(name, np.roll(editor.array(name), 1, axis=0))
    code, value = located(folder, corpus, capsys)
    assert code == 1
    first = value["blamed"][0]
    assert (first["layer"], first["module"]) == ("layer 3", "router")
    assert first["router_agreement"] < 0.2


def test_few_documents_are_inconclusive(
    export: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, few = shutil.copytree(export, tmp_path / "damaged"), tmp_path / "few.jsonl"
    editor = CheckpointEditor(folder)
    name = "model.layers.3.mlp.gate.weight"
    editor.store(name, np.roll(editor.array(name), 1, axis=0))
    few.write_text("".join(corpus.read_text().splitlines(keepends=True)[:7]))
    code, value = located(folder, few, capsys)
    assert (code, value["verdict"]) == (3, "inconclusive")
    assert "7 documents: fewer than 8" in value["notes"][0]
    assert value["blamed"][0]["module"] == "router"


def test_damage_outside_the_weights_is_inconclusive(
    export: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(export, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    code, value = located(folder, corpus, capsys)
    assert (code, value["verdict"], value["blamed"]) == (3, "inconclusive", [])
    assert "not in the weights (config.json)" in value["notes"][0]


def test_layers_one_by_one_compute_what_the_whole_model_does() -> None:
    checkpoint = open_checkpoint(BASE)
    whole = load_model(checkpoint).model
    streamed = StreamedModel(checkpoint)
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    hidden = torch.zeros(0)
    with torch.inference_mode():
        for model in (whole, streamed.model):
            model.set_experts_implementation("eager")
        expected = whole(input_ids=ids, use_cache=False, output_hidden_states=True)
        for stage in range(streamed.head + 1):
            with streamed.loaded(stage):
                hidden = streamed.run(stage, ids, hidden)
            if stage < streamed.head - 1:
                assert torch.equal(hidden, expected.hidden_states[stage]), stage
    assert torch.equal(hidden, expected.logits)
    assert all(p.is_meta for layer in streamed.layers for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-ratio", "0.9x"], "give a ratio above 1"),
        (["--drift-against", "absent.run"], "no such file"),
        (["--scratch", "absent"], "no such directory"),
        (["--corpus", "absent.txt"], "no corpus"),
        (["-o", "page.md"], "unknown format 'markdown'; one of text, json, html"),
    ],
)
def test_bad_options_are_usage_errors(
    options: list[str], message: str, export: Path, corpus: Path, capsys: Capture
) -> None:
    argv = ["locate", str(export), "--base", str(BASE), "--corpus", str(corpus)]
    assert run([*argv, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_is_not_replaced(export: Path, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("kept")
    argv = ["locate", str(export), "--base", str(BASE), "--corpus", str(corpus), "-o", str(file)]
    assert run(argv) == 2
    assert file.read_text() == "kept"


def test_the_base_itself_is_a_usage_error(corpus: Path, capsys: Capture) -> None:
    assert run(["locate", str(BASE), "--base", str(BASE), "--corpus", str(corpus)]) == 2
    assert "the candidate is the base itself" in capsys.readouterr().err
