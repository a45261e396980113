# SPDX-License-Identifier: Apache-2.0
"""``--format`` and ``-o`` of commands with one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.paths import TESTS
from verifier.cli import run

CKPT = str(TESTS / "data" / "modelopt" / "llama_mxfp8")


def test_the_ending_says_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "stats.json", tmp_path / "stats.txt"
    assert run(["stats", CKPT, "-o", str(file)]) == 0
    assert run(["stats", CKPT, "--format", "json"]) == 0
    assert file.read_text() == capsys.readouterr().out
    assert run(["stats", "-o", str(text), CKPT]) == 0
    assert text.read_text().startswith(CKPT)


def test_a_given_format_counts_more_than_the_ending(tmp_path: Path) -> None:
    file = tmp_path / "diff.out"
    assert run(["diff", CKPT, CKPT, "-o", str(file), "--format", "json"]) == 0
    assert json.loads(file.read_text())["equal"] is True


def test_an_unknown_ending_and_an_existing_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["stats", CKPT, "-o", str(tmp_path / "stats.yaml")]) == 2
    assert "its ending says no format (.txt, .json); give --format" in capsys.readouterr().err
    file = tmp_path / "kept.json"
    file.write_text("kept")
    assert run(["stats", CKPT, "-o", str(file)]) == 2
    assert (file.read_text(), "--overwrite" in capsys.readouterr().err) == ("kept", True)
    assert run(["stats", CKPT, "-o", str(file), "--overwrite"]) == 0
    assert json.loads(file.read_text())["tensors"] > 0


def test_an_error_goes_to_stderr_where_the_result_goes_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 64)
    run(["show", str(tmp_path / "bad"), "x", "-o", str(tmp_path / "out.json")])
    out, err = capsys.readouterr()
    assert (out, bool(err)) == ("", True)
    assert not (tmp_path / "out.json").exists()


def test_reports_are_replaced_and_may_be_asked_to(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    for option in ([], [], ["--overwrite"]):
        assert run(["check", CKPT, "-o", str(file), *option]) == 0
        assert json.loads(file.read_text())["verdict"] == "passed"
        file.write_text("old")
