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
from tests.engines.scores import GOLDEN, RECIPES, scores
from verifier.cli import run
from verifier.engines.loader import TRIED

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


@NEEDS_VLLM
@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_scores_what_transformers_scores(tmp_path: Path, recipe: str) -> None:
    """A window is as long as the model's context, and the corpus is of ids: no tokenizer."""
    result = scores(os.environ[PYTHON], recipe, tmp_path, documents=2)
    assert result["ours"] == pytest.approx(result["vllm"], abs=0.01)
