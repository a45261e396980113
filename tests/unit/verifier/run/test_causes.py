# SPDX-License-Identifier: Apache-2.0
"""Findings that follow from another one: reported once to people, and never lost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import verifier
from tests.paths import ROOT, TESTS
from verifier.findings import Finding, Report
from verifier.report import render, render_json
from verifier.report.wording import repair_line
from verifier.run.fingerprints import fingerprinted
from verifier.run.merge import report_of

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny" / "mxfp8"
ONE_FORMAT = TESTS / "data" / "modelopt" / "qwen3moe_nvfp4_experts_max"
SHARD = "model-00001-of-00002.safetensors"


def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "release"))


def causes(report: Report) -> Counter[tuple[str, str]]:
    """Return how many findings of a rule the findings of a rule explain; '' for none."""
    rules = {f.fingerprint: f.rule for f in report.findings}
    return Counter((f.rule, rules.get(f.explained_by, "")) for f in report.findings)


def break_header(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[8:9] = b"["
    (folder / SHARD).write_bytes(data)


def remove(folder: Path) -> None:
    (folder / SHARD).unlink()


@pytest.mark.parametrize(("edit", "cause"), [(break_header, "QC104"), (remove, "QC101")])
def test_a_lost_shard_explains_what_its_tensors_lack(
    tmp_path: Path, edit: Callable[[Path], None], cause: str
) -> None:
    release = copy(GOLDEN, tmp_path)
    edit(release)
    report = verifier.check(release)
    found = causes(report)
    assert found[cause, ""] == 1
    assert found["QC205", cause] == 22
    assert found["QC207", cause] == 3
    assert found["QC404", cause] == 3
    assert {rule for rule, by in found if not by} == {cause}
    text = render(report, "text")
    assert f"explains {len(report.findings) - 1} findings of QC" in text
    assert "QC205  missing tensor" not in text
    assert "QC205  missing tensor" in render(report, "text", verbose=True)
    assert repair_line(report) == ""


def test_a_tensor_that_no_shard_was_to_hold_is_not_explained(tmp_path: Path) -> None:
    release = copy(GOLDEN, tmp_path)
    index = release / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    del body["weight_map"]["language_model.lm_head.weight"]
    index.write_text(json.dumps(body))
    break_header(release)
    report = verifier.check(release)
    own = [f.where.tensor for f in report.by_rule("QC205") if not f.explained_by]
    assert own == ["language_model.lm_head.weight"]
    assert "language_model.lm_head.weight" in render(report, "text")


def prefixed(folder: Path) -> Path:
    """Forget the head, and put ``model.`` before every other exclusion, in both declarations."""
    for name, key in (
        ("config.json", "quantization_config"),
        ("hf_quant_config.json", "quantization"),
    ):
        file = folder / name
        body = json.loads(file.read_text())
        for field in ("ignore", "exclude_modules"):
            if field in body[key]:
                body[key][field] = [
                    f"model.{pattern}" for pattern in body[key][field] if pattern != "lm_head"
                ]
        file.write_text(json.dumps(body))
    return folder


def test_exclusions_with_a_wrong_prefix_explain_the_layers_that_they_miss(tmp_path: Path) -> None:
    report = verifier.check(prefixed(copy(ONE_FORMAT, tmp_path)))
    found = causes(report)
    assert found["QC402", "QC404"] == 5
    own = [f.where.tensor for f in report.by_rule("QC402") if not f.explained_by]
    assert own == ["lm_head.weight"]
    text = render(report, "text")
    assert text.index("QC404") < text.index("explains 5 findings of QC402") < text.index("QC402  ")


def test_a_milder_or_accepted_finding_explains_nothing(tmp_path: Path) -> None:
    release = prefixed(copy(ONE_FORMAT, tmp_path))
    milder = verifier.check(release, severity={"QC404": "warning"})
    assert not any(f.explained_by for f in milder.findings)


def test_every_report_has_all_findings(tmp_path: Path) -> None:
    report = verifier.check(prefixed(copy(ONE_FORMAT, tmp_path)))
    assert report_of(json.loads(render_json(report))).findings == report.findings
    name = ".self_attn.q_proj.weight"
    for format_ in ("json", "sarif", "markdown", "html", "concise"):
        assert name in render(report, format_), format_
    assert "explained by QC404" in render(report, "html")
    assert "5 findings that these explain" in render(report, "markdown")


def test_findings_whose_cause_is_not_shown_are_shown() -> None:
    (finding,) = fingerprinted([Finding("QC205", "error", "missing tensor")])
    alone = Report("failed", "x", None, (replace(finding, explained_by="0" * 32),), ())
    assert "missing tensor" in render(alone, "text")
