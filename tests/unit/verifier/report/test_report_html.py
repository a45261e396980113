# SPDX-License-Identifier: Apache-2.0
"""The page of runs: well formed, without script, bounded, escaped, tolerant of what a run does not
have.
"""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.errors import ContentError
from verifier.history import append, recorded
from verifier.inspect.noise import noise
from verifier.report.figures import Point, Row, Series, documents, forest, heat, series, survival
from verifier.report.runs import MAX_BYTES, Figure, render_runs
from verifier.report.svg import ticks

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
HOSTILE = '"><script>alert(1)</script><img src=x onerror=a>&\x1b[31m'


def gate_run(count: int = 30, **changed: Any) -> dict[str, Any]:
    rng = random.Random(3)  # noqa: S311
    documents_ = [[1000.0, 1000.0 + 400 * rng.gauss(0.01, 0.01), 400] for _ in range(count)]
    documents_[min(7, count - 1)] = [1000.0, 1040.0, 400]
    return {
        "verdict": "inconclusive",
        "candidate": "/x/M3-NVFP4",
        "base": "/x/M3",
        "margin": {"nats": 0.012, "source": "given"},
        "interval": {"delta": 0.0105, "low": 0.009, "high": 0.0125, "se": 0.001},
        "key": {"corpus": "c", "window": 512},
        "documents": documents_,
        "perplexity_base": 20.0,
        "perplexity_candidate": 20.2,
    } | changed


def pictures(page: str) -> list[ET.Element]:
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, re.S)]  # noqa: S314  (our own)


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def harmless(page: str) -> None:
    read = Reader()
    read.feed(page)
    assert not {"script", "img", "iframe", "object", "link", "a"} & set(read.tags)
    assert not [
        n for n, _ in read.attributes if n.startswith("on") or n in ("href", "src", "xlink:href")
    ]
    assert "url(" not in page
    assert "\x1b" not in page
    assert len(page.encode()) <= MAX_BYTES


def words(picture: ET.Element) -> str:
    return " ".join(e.text or "" for e in picture.iter("text"))


def test_the_page_has_a_forest_and_the_worst_ten_documents() -> None:
    page = render_runs([gate_run()])
    harmless(page)
    first, second = pictures(page)
    assert "margin 0.012" in words(first)
    assert "inconclusive" in words(first)
    assert len([e for e in second.iter("rect") if e.get("class") == "failed"]) == 10
    table = re.search(r"The worst 10.*?</details>", page, re.S)
    assert table is not None
    assert table[0].index("document 7<") < table[0].index("+0.10000")
    assert table[0].count("<tr>") == 11


@pytest.mark.parametrize(("old", "new"), [("unproven", "inconclusive"), ("broken", "error")])
def test_a_run_of_version_0_1_is_shown_with_the_verdicts_named_as_now(old: str, new: str) -> None:
    page = render_runs([gate_run(verdict=old)])
    assert f'<p class="verdict {new}">' in page
    assert old not in page


def test_every_picture_has_a_text_for_who_cannot_see_it() -> None:
    for picture in pictures(render_runs([gate_run()])):
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label") or "") > 20
        assert picture.find("title") is not None
        assert picture.find("desc") is not None


def test_marks_stand_where_the_numbers_say() -> None:
    (picture,) = pictures(forest([Row("a", 0.0, -1.0, 1.0, 0.5, "inconclusive")], "nats"))
    (margin,) = [e for e in picture.iter("line") if e.get("class") == "margin"]
    (whisker,) = [e for e in picture.iter("line") if e.get("class") == "inconclusive line-w"]
    (middle,) = picture.iter("circle")
    low, high = float(whisker.get("x1") or 0), float(whisker.get("x2") or 0)
    assert float(middle.get("cx") or 0) == pytest.approx((low + high) / 2, abs=0.1)
    assert float(margin.get("x1") or 0) == pytest.approx(low + 0.75 * (high - low), abs=0.1)


def test_a_run_with_less_has_fewer_pictures() -> None:
    page = render_runs([gate_run(documents=[])])
    assert len(pictures(page)) == 1
    page = render_runs([gate_run(interval=None, nonfinite=[1, 2], verdict="failed")])
    assert "logits in 2 documents; no statistics" in page
    assert pictures(page) == []
    render_runs([{"candidate": "x", "key": {}, "interval": None}])


def test_a_run_with_more_has_more_pictures() -> None:
    rich = gate_run(
        drift={
            "accepted": "old",
            "margin": {"nats": 0.003},
            "interval": {"delta": 0.02, "low": 0.01, "high": 0.03},
        },
        measures={
            "kl": {
                "kind": "lockstep",
                "mean": {"delta": 0.02},
                "tail": [1, 0.9, 1.1],
                "survival": {
                    "candidate": [[1e-4, 0.9], [1, 1e-4]],
                    "base/base": [[1e-6, 0.5], [1e-3, 1e-4]],
                },
            }
        },
        experts=[{"layer": "layers.1", "experts": 3, "tokens": [5, 0, 9]}],
    )
    shown = pictures(render_runs([rich]))
    assert len(shown) == 4
    assert "drift of M3-NVFP4" in words(shown[0])
    assert "failed" in words(shown[0])
    assert "base/base" in words(shown[2])
    assert "framed: layers.1, 1" in words(shown[3])


@pytest.mark.parametrize(
    "junk", [None, 5, "x", [], [[]], {"a": {}}, [None], {"delta": "x"}, [[1, 2]], math.inf]
)
def test_fields_of_other_shapes_are_passed_over(junk: Any) -> None:
    fields = (
        "interval",
        "margin",
        "documents",
        "measures",
        "drift",
        "experts",
        "key",
        "environment",
        "notes",
        "nonfinite",
    )
    for field in fields:
        harmless(render_runs([gate_run(**{field: junk})]))
    for field in ("kl", "top1"):
        harmless(render_runs([gate_run(measures={field: junk})]))
    harmless(
        render_runs([gate_run(measures={"kl": {"survival": junk, "tail": junk, "mean": junk}})])
    )
    for field in ("findings", "coverage", "stats"):
        check = {"uri": "x", "verdict": "failed", "findings": [], "coverage": [], "stats": {}}
        harmless(render_runs([check | {field: junk}]))


def test_names_from_files_are_escaped() -> None:
    bad = gate_run(
        candidate=f"/x/{HOSTILE}", base=HOSTILE, environment={HOSTILE: HOSTILE}, notes=[HOSTILE]
    )
    bad["margin"]["source"] = bad["key"]["corpus"] = HOSTILE
    bad["experts"] = [{"layer": HOSTILE, "tokens": [1, 2]}]
    bad["measures"] = {"kl": {"kind": HOSTILE, "survival": {HOSTILE: [[0.1, 0.1]]}}}
    where = {"tensor": HOSTILE}
    finding = {
        "rule": HOSTILE,
        "severity": HOSTILE,
        "message": HOSTILE,
        "where": where,
        "count": 1,
        "of": None,
    }
    check = {
        "uri": HOSTILE,
        "verdict": HOSTILE,
        "findings": [finding],
        "coverage": [],
        "stats": {"formats": {HOSTILE: 1}},
    }
    page = render_runs(
        [bad, check],
        [Figure(HOSTILE, HOSTILE, series([Series(HOSTILE, [point(0, 1.0)])], HOSTILE))],
    )
    harmless(page)
    assert len(pictures(page)) == 5


def test_the_page_stays_below_two_megabytes_and_says_what_it_left_out() -> None:
    many = [gate_run(5000, candidate=f"/x/{i}" + "y" * 100) for i in range(70)]
    page = render_runs(many)
    harmless(page)
    assert "Left out, so that the page stays below 2 MB" in page
    findings = [
        {
            "rule": "QC501",
            "severity": "error",
            "message": "m" * 5000,
            "where": {"tensor": "t" * 5000},
        }
    ] * 5000
    page = render_runs(
        [{"uri": "x", "verdict": "failed", "findings": findings, "coverage": [], "stats": {}}]
    )
    harmless(page)
    assert "4,800 more findings are not shown" in page


def test_experts_that_no_token_reached_are_shown() -> None:
    page = render_runs(
        [gate_run(documents=[], experts=[{"layer": "layers.3", "experts": 4, "unreached": [2]}])]
    )
    assert "framed: layers.3, 2" in words(pictures(page)[-1])


def test_many_cells_keep_the_worst_rows() -> None:
    cells = {(f"layer {r}", f"{c}"): 20.0 + r for r in range(400) for c in range(128)}
    cells["layer 399", "5"] = 1.0
    picture = heat(cells, "x", "dB")
    assert picture.count("<rect") < 6000
    assert "framed: layer 399, 5" in picture
    assert "further rows are not shown" in picture


def test_rows_and_columns_stand_in_natural_order() -> None:
    (picture,) = pictures(
        heat({(f"layer {r}", f"{c}"): r + c for r in (10, 9, 2) for c in (11, 3)}, "x", "dB")
    )
    told = [e.text for e in picture.iter("text")]
    assert told.index("layer 2") < told.index("layer 9") < told.index("layer 10")
    assert told.index("3") < told.index("11")
    roles = ("mlp", "attention", "routed_expert", "indexer")
    (picture,) = pictures(heat({(r, "1"): 1.0 + len(r) for r in roles}, "x", "dB"))
    assert [e.text for e in picture.iter("text") if e.text in roles] == sorted(roles)


def point(at: int, value: float, verdict: str = "passed") -> Point:
    return Point(at, value, value - 0.1, value + 0.1, verdict, f"run {at}")


def test_a_time_series_has_ribbon_golden_steps_and_change_points() -> None:
    found = Series(
        "M3",
        [point(i, 1.0 if i < 3 else 2.0) for i in range(6)],
        [(0, 1.0), (4, 2.0)],
        [(3, "recipe a -> b")],
    )
    (picture,) = pictures(series([found], "loss"))
    assert len([e for e in picture.iter("line") if e.get("class") == "golden"]) == 3
    assert [e for e in picture.iter("path") if e.get("class") == "ribbon s0"]
    assert "recipe a -> b" in words(picture)
    assert "change at run 4: recipe a -> b" in (picture.get("aria-label") or "")


@pytest.mark.parametrize(
    "values", [[0.0], [1e300, -1e300], [5.0, 5.0], [1e-300, 2e-300], [-3.0, -2.0]]
)
def test_odd_numbers_make_whole_pictures(values: list[float]) -> None:
    shown = [
        documents([(f"document {i}", v) for i, v in enumerate(values)], values[0]),
        forest([Row("x", v, v, v, None, "passed") for v in values], "nats"),
        series(
            [Series("x", [Point(i, v, None, None, "passed", "") for i, v in enumerate(values)])],
            "loss",
        ),
        heat({("r", str(i)): v for i, v in enumerate(values)}, "x", "dB"),
    ]
    for picture in shown:
        assert "nan" not in picture
        assert "inf" not in picture.replace("info", "")
        pictures(picture)
    assert survival({"x": [(v, v) for v in values if v > 0]}).count("<svg") in (0, 1)
    assert len(ticks(min(values), max(values))) <= 50


def test_signal_to_noise_is_what_the_weights_say(tmp_path: Path) -> None:
    found = noise(GOLDEN / "mxfp8", GOLDEN / "bf16")
    assert found.left_out == 0
    assert found.weights == sum(
        n.endswith("weight_scale_inv") for n in open_checkpoint(GOLDEN / "mxfp8").tensors
    )
    assert all(
        28 < v < 35 for v in found.roles.values()
    )  # E4M3 with a scale a block of 32: 3 bits of mantissa
    assert ("layer 1", "7") in found.experts
    copy = tmp_path / "damaged"
    shutil.copytree(GOLDEN / "mxfp8", copy)
    ckpt = open_checkpoint(copy)
    name = next(
        n for n in ckpt.tensors if ".layers.2." in n and ".experts.3.w2.weight_scale_inv" in n
    )
    t = ckpt.tensors[name]
    with (copy / t.file).open("r+b") as handle:
        handle.seek(t.offset)
        handle.write(bytes(127 for _ in range(t.nbytes)))
    damaged = noise(copy, GOLDEN / "bf16")
    assert min(damaged.experts, key=lambda k: damaged.experts[k]) == ("layer 2", "3")
    assert damaged.experts["layer 2", "3"] < 10
    with pytest.raises(ContentError):
        noise(GOLDEN / "bf16", GOLDEN / "bf16")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, history = tmp_path / "g.json", tmp_path / "r.html", tmp_path / "h"
    file.write_text(json.dumps(gate_run()))
    for _ in range(3):
        append(history, recorded(gate_run()))
    assert run(["report", str(file), "-o", str(out), "--history", str(history)]) == 0
    page = out.read_text()
    harmless(page)
    assert "loss over time" in page
    assert len(pictures(page)) == 3
    assert run(["history", "plot", "-f", str(history), "-o", str(tmp_path / "p.svg")]) == 0
    assert ET.parse(tmp_path / "p.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
    assert (
        run(
            [
                "history",
                "plot",
                "-f",
                str(history),
                "-o",
                str(tmp_path / "q.svg"),
                "--measure",
                "nothing",
            ]
        )
        == 1
    )
    assert not (tmp_path / "q.svg").exists()
    file.write_text("{}")
    before = out.read_bytes()
    assert run(["report", str(file), "-o", str(out)]) == 1
    assert out.read_bytes() == before
    assert run(["report", str(tmp_path / "absent"), "-o", str(out)]) == 2
    assert run(["report", str(file), "-o", str(tmp_path)]) == 2
    capsys.readouterr()


def test_the_drift_against_a_golden_is_a_row_of_the_forest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verifier.goldens import hold

    monkeypatch.delenv("CI", raising=False)
    file, golden = tmp_path / "g.json", tmp_path / "x.golden.json"
    hold(gate_run(), golden)
    assert run(["goldens", "accept", "x", "--reason", "first", "-d", str(tmp_path)]) == 0
    worse = gate_run()
    worse["documents"] = [
        [b, q + t * (0.01 + 0.0001 * (i % 3)), t] for i, (b, q, t) in enumerate(worse["documents"])
    ]
    file.write_text(json.dumps(worse))
    args = ["report", str(file), "-o", str(tmp_path / "r.html"), "--golden", str(golden)]
    assert run(args) == 0
    (first, _) = pictures((tmp_path / "r.html").read_text())
    assert "drift of M3-NVFP4" in words(first)
    assert "margin 0.003" in words(first)
    assert "failed" in words(first)
    file.write_text(json.dumps(gate_run()))
    assert run(args) == 1  # equal to the last bit: there is no interval


def test_a_check_is_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["check", str(GOLDEN / "mxfp8"), "--base", str(GOLDEN / "bf16")]
    assert run([*args, "--format", f"json={tmp_path / 'c.json'}"]) == 0
    assert (
        run(["report", str(tmp_path / "c.json"), "-o", str(tmp_path / "r.html"), "--weights"]) == 0
    )
    page = (tmp_path / "r.html").read_text()
    harmless(page)
    assert "check PASSED" in page
    assert "Signal to quantization noise by layer and expert" in page
    capsys.readouterr()
