# SPDX-License-Identifier: Apache-2.0
"""The committed runs of vLLM, and vLLM itself where an interpreter has it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from exporter import export
from tests.engines import page
from tests.engines.environment import PYTHON, default_version
from tests.paths import ROOT
from verifier.cli import run
from verifier.engines.loader import TRIED
from verifier.gate.run_file import read_run

GOLDEN = ROOT / "goldens" / "qwen3-moe-tiny"
DOCUMENTS = 4
NEEDS_VLLM = pytest.mark.skipif(
    not os.environ.get(PYTHON), reason=f"{PYTHON} does not name an interpreter with vLLM"
)


def test_the_page_is_rendered_from_the_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render()
    assert page.read()["engine"] == f"vllm {default_version()}"
    assert default_version() in TRIED


def test_exports_that_pass_and_fail_in_the_engine_are_on_the_page() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for row in page.violations(page.read()):
        assert f"* {row.name}, {row.recipe}: {row.engine}" in text


@NEEDS_VLLM
def test_depth_engine_with_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    export(GOLDEN / "bf16", out, recipe="nvfp4_default", input_scale="one")
    command = ["check", str(out), "--base", str(GOLDEN / "bf16"), "--depth", "engine"]
    command += ["--engine-python", os.environ[PYTHON], "--format", "json"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert {c["rule"]: c["checked"] for c in report["coverage"]}["QC602"] > 50


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """Return vLLM's interpreter with a plugin that selects vLLM's emulation on a CPU."""
    path = tmp_path / "python"
    plugin = Path(__file__).with_name("plugin")
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{plugin}" exec "{os.environ[PYTHON]}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@NEEDS_VLLM
@pytest.mark.parametrize("recipe", ["", "mxfp8_attention.yaml"])
def test_vllm_scores_what_transformers_scores(
    tmp_path: Path, interpreter: str, recipe: str
) -> None:
    """A window is as long as the model's context, and the corpus is of ids: no tokenizer."""
    model = GOLDEN / "bf16"
    if recipe:
        export(model, tmp_path / "out", recipe=Path(__file__).with_name(recipe))
        model = tmp_path / "out"
    engine = ["--scorer", "vllm", "--engine-python", interpreter]
    engine += ["--engine-option", "enforce_eager=true"]
    nats = []
    for name, scorer in (("hf", []), ("vllm", engine)):
        file = tmp_path / f"{name}.run"
        corpus = ["--corpus", str(GOLDEN / "corpus.jsonl"), "--documents", str(DOCUMENTS)]
        command = ["score", str(model), *corpus, "--seq-len", "2048", "-o", str(file), *scorer]
        assert run(command) == 0
        nats.append(float(read_run(file).arrays["nats"].mean()))
    print(f"{recipe or 'bf16'}: {nats[0]:.5f} here, {nats[1]:.5f} in vLLM")
    assert nats[0] == pytest.approx(nats[1], abs=0.005)
