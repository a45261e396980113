# SPDX-License-Identifier: Apache-2.0
"""`ckptgate recipes`, and what `ckptgate export` does beside exporting: calibrate first, preview
afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.paths import ROOT
from verifier.cli.main import run
from verifier.load.preview import Continuation, trim

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    rows = np.random.default_rng(3).integers(0, 256, (8, 40)).tolist()
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    return file


def test_recipes_are_listed_shown_and_explained(
    kit, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("\n") == 9 and "fp8_block128" in listed
    assert run(["recipes", "show", "mxfp8_nvfp4_experts"]) == 0
    shown = capsys.readouterr().out
    mine = tmp_path / "mine.yaml"
    mine.write_text(shown.replace("name: mxfp8_nvfp4_experts", "name: mine"))
    expert, router = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.gate"
    assert (
        run(["recipes", "explain", expert, "--recipe", str(mine), "--source", str(kit.qwen)]) == 0
    )
    said = capsys.readouterr().out
    assert (
        "role routed_expert" in said
        and "rule 2 (routed_expert: nvfp4): decides" in said
        and "mine: nvfp4" in said
    )
    assert run(["recipes", "explain", router]) == 0
    said = capsys.readouterr().out
    assert "role router; wildcards never match it" in said and said.count("not quantized") == 9


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "nvfp4_expert_only"], 2, "Did you mean nvfp4_experts_only?"),
        (
            ["explain", "model.layers.0.mlp.gat", "--source", "{qwen}"],
            1,
            r"the nearest names are model.layers.*.mlp.gate",
        ),
        (["explain", "lm_head", "--recipe", "{bad}"], 2, "rules.0.roles: Input should be"),
    ],
)
def test_recipes_that_are_wrong(
    kit,
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nrules:\n  - roles: routed_expert\n    format: nvfp4\n")
    assert run(["recipes", *(a.format(qwen=kit.qwen, bad=bad) for a in arguments)]) == code
    assert said in capsys.readouterr().err


def test_a_role_with_a_typo_names_the_nearest(
    kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nrules:\n  - roles: [routed_experts]\n    format: nvfp4\n")
    assert run(["export", str(kit.qwen), str(tmp_path / "out"), "--recipe", str(bad)]) == 2
    assert 'unknown role "routed_experts": did you mean routed_expert?' in capsys.readouterr().err


def test_calibrate_and_export_in_one_run(
    kit, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out", "nvfp4_experts_only_mse"
    head = ["export", str(kit.qwen), str(out), "--recipe", recipe, "--kv", "fp8"]
    assert (
        run([*head, "--calibrate-texts", str(ids), "--", "--samples", "8", "--seq-len", "32"]) == 0
    )
    text = capsys.readouterr().out
    assert (
        "calibrated 48 modules" in text
        and "48 of 48 linear layers (32 after fusing), scale search: sweep" in text
    )
    stats = tmp_path / "one.stats"
    two = [
        "calibrate",
        str(kit.qwen),
        "--recipe",
        recipe,
        "--texts",
        str(ids),
        "--samples",
        "8",
        "--seq-len",
        "32",
    ]
    assert run([*two, "-o", str(stats)]) == 0
    assert stats.read_bytes() == (tmp_path / "out.stats.safetensors").read_bytes()
    again = [
        "export",
        str(kit.qwen),
        str(tmp_path / "again"),
        "--recipe",
        recipe,
        "--kv",
        "fp8",
        "--stats",
        str(stats),
    ]
    assert run(again) == 0
    assert kit.read(out) == kit.read(tmp_path / "again")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--stats", "x", "--calibrate-texts", "{ids}"],
            "--calibrate-texts and --stats contradict",
        ),
        (
            ["--input-scale", "one", "--calibrate-texts", "{ids}"],
            "--calibrate-texts and --input-scale contradict",
        ),
        (["--dry-run", "--calibrate-texts", "{ids}"], "--calibrate-texts runs the model"),
        (
            ["--calibrate-texts", "{ids}", "--", "--recipe", "x"],
            "--recipe: export sets this option of calibrate",
        ),
        (
            ["--calibrate-texts", "{ids}", "--", "-ofile"],
            "-ofile: export sets this option of calibrate",
        ),
        (
            ["--calibrate-texts", "{ids}", "--", "--texts=a"],
            "--texts=a: export sets this option of calibrate",
        ),
        (
            ["--calibrate-texts", "{ids}", "--", "--samples", "3,4"],
            "1 --texts and 2 numbers in --samples",
        ),
        (
            ["--input-scale", "one", "stray"],
            "stray: arguments after OUT are passed to calibrate, which",
        ),
        (["--input-scale", "one", "--preview", "nowhere"], "--preview nowhere: no such file"),
        (["--input-scale", "one", "--preview", "{empty}"], "0 prompts; use 1 to 32"),
        (["--input-scale", "one", "--preview", "{odd}"], "line 1 is neither"),
    ],
)
def test_options_that_do_not_go_together(
    kit, ids: Path, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, odd = tmp_path / "empty.txt", tmp_path / "odd.jsonl"
    empty.write_text("\n")
    odd.write_text('{"ids": [-1]}\n')
    given = [m.format(ids=ids, empty=empty, odd=odd) for m in more]
    out = tmp_path / "out"
    assert run(["export", str(kit.qwen), str(out), "--recipe", "nvfp4_experts_only", *given]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden is not here")
def test_a_preview_shows_both_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("the town of\n")
    arguments = [
        "export",
        str(GOLDEN / "bf16"),
        str(tmp_path / "out"),
        "--recipe",
        "w4a16_nvfp4_experts_only",
    ]
    assert run([*arguments, "--preview", str(prompts), "--json-report", str(report)]) == 0
    text = capsys.readouterr().out
    assert "preview    the town of" in text and "tokens identical" in text
    (row,) = json.loads(report.read_text())["preview"]
    assert row["prompt"] == "the town of" and row["source"] and row["quantized"]


@pytest.mark.parametrize(
    ("ids", "pad", "left"),
    [
        ([0, 0, 5, 0, 6], 0, [5, 0, 6]),
        ([0, 0], 0, [0, 0]),
        ([5, 0], 0, [5, 0]),
        ([7, 8], None, [7, 8]),
        ([], 0, []),
    ],
)
def test_leading_pads_go_where_something_remains(
    ids: list[int], pad: int | None, left: list[int]
) -> None:
    """A tokenizer whose pad is its end token must not lose a prompt of end tokens alone."""
    assert trim(ids, pad) == left


def test_continuations_are_compared_from_the_start() -> None:
    a = Continuation("p", "", (1, 2, 3))
    assert [a.same(Continuation("p", "", t)) for t in ((1, 2, 3), (1, 2), (1, 9, 3), (9,), ())] == [
        3,
        2,
        1,
        0,
        0,
    ]


def test_an_unchecked_export_says_so(
    kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "nvfp4_experts_only", "--input-scale", "one", "--for", "none"]
    out, report = tmp_path / "out", tmp_path / "report.json"
    command = ["export", str(kit.qwen), str(out), *arguments]
    assert run([*command, "--no-check", "--json-report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"not checked (--no-check): ckptgate check {out} --depth payload" in printed
    assert "verdict" not in printed
    assert json.loads(report.read_text())["check"] is None
    manifest = json.loads((out / "ckptgate_manifest.json").read_text())
    assert manifest["notes"]["check"] == "left out (--no-check)"
    assert run([*command, "--overwrite"]) == 0
    assert "not checked" not in capsys.readouterr().out
    manifest = json.loads((out / "ckptgate_manifest.json").read_text())
    assert "check" not in manifest["notes"]
