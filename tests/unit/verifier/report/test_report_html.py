# SPDX-License-Identifier: Apache-2.0
"""The page of results: well formed, without script, bounded in size, escaped."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.results import gate_result, interval, summary, write_result
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.errors import ContentError
from verifier.evaluation import Drift, ExpertReach, GateResult, Kl, KlRatio, Margin, Measures
from verifier.findings import Finding, Report, Where
from verifier.goldens import compare_with_golden
from verifier.history import append, recorded
from verifier.inspect.noise import noise
from verifier.report.figures import Figure, Point, Row, Series, documents, forest, heat, time_series
from verifier.report.page import MAX_BYTES, render_page
from verifier.report.svg import ticks

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
HOSTILE = '"><script>alert(1)</script><img src=x onerror=a>&\x1b[31m'


def gate(count: int = 30, **changed: Any) -> GateResult:
    rng = random.Random(3)  # noqa: S311
    documents_ = [(1000.0, 1000.0 + 400 * rng.gauss(0.01, 0.01), 400) for _ in range(count)]
    documents_[min(7, count - 1)] = (1000.0, 1040.0, 400)
    fields = {
        "outcome": "inconclusive",
        "candidate": "/x/M3-NVFP4",
        "margin": Margin(0.012, "given"),
        "interval": interval(0.0105, 0.002),
        "documents": documents_,
    }
    return gate_result(**fields | changed)


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


def test_the_page_has_a_forest_and_the_worst_documents() -> None:
    page = render_page([gate()])
    harmless(page)
    first, second = pictures(page)
    assert "margin 0.012" in words(first)
    assert "inconclusive" in words(first)
    assert len([e for e in second.iter("rect") if e.get("class") == "worst"]) == 6
    table = re.search(r"The worst 6.*?</details>", page, re.S)
    assert table is not None
    assert table[0].index("document 7<") < table[0].index("+0.10000")
    assert table[0].count("<tr>") == 7


def test_every_picture_has_a_text_for_who_cannot_see_it() -> None:
    for picture in pictures(render_page([gate()])):
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label") or "") > 20
        assert picture.find("title") is not None
        assert picture.find("desc") is not None


def test_marks_stand_where_the_numbers_say() -> None:
    (picture,) = pictures(forest([Row("a", interval(0.0, 1.0), 0.5, "inconclusive")], "nats"))
    (margin,) = [e for e in picture.iter("line") if e.get("class") == "margin"]
    (whisker,) = [e for e in picture.iter("line") if e.get("class") == "inconclusive line-w"]
    (middle,) = picture.iter("circle")
    low, high = float(whisker.get("x1") or 0), float(whisker.get("x2") or 0)
    assert float(middle.get("cx") or 0) == pytest.approx((low + high) / 2, abs=0.1)
    assert float(margin.get("x1") or 0) == pytest.approx(low + 0.75 * (high - low), abs=0.1)


def test_a_result_with_less_has_fewer_pictures() -> None:
    page = render_page([gate(documents=[])])
    assert len(pictures(page)) == 1
    page = render_page([gate(interval=None, nonfinite=[1, 2], outcome="failed", documents=[])])
    assert "logits in 2 documents; no statistics" in page
    assert pictures(page) == []


def test_a_result_with_more_has_more_pictures() -> None:
    rich = gate(
        drift=Drift("old", Margin(0.003, "default"), interval(0.02, 0.01)),
        measures=Measures(kl=Kl("lockstep", interval(0.02), (1.0, 0.9, 1.1))),
        experts=(ExpertReach("layers.1", 3, (1,)),),
    )
    page = render_page([rich])
    shown = pictures(page)
    assert len(shown) == 3
    assert "drift of M3-NVFP4" in words(shown[0])
    assert "failed" in words(shown[0])
    assert "worst: layers.1, 1" in words(shown[2])
    assert "99.9% quantile 1.0000 nats (lockstep)" in page
    assert "gate INCONCLUSIVE, drift FAILED" in page


def test_a_drift_by_the_kl_ratio_and_doubts_are_facts() -> None:
    ratio = KlRatio(
        "lower bounds", 0.003, 0.002, interval(math.log(1.5), 0.1), Margin(math.log(1.15), "")
    )
    drift = Drift("old", Margin(0.003, "default"), interval(0.02, 0.01), ratio)
    page = render_page([gate(drift=drift, doubts=("the base is a uniform guess",))])
    assert "1.500 times the accepted run" in page
    assert "margin 1.15 times (lower bounds)" in page
    assert "the base is a uniform guess" in page
    # The loss over the accepted run does not decide: it is not drawn against a margin.
    assert "drift of M3-NVFP4" not in words(pictures(page)[0])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300])
def test_numbers_that_cannot_be_drawn_are_left_out(value: float) -> None:
    wild = gate(
        interval=interval(value, 0.0),
        documents=[(0.0, value, 1)],
        measures=Measures(kl=Kl("x", interval(value), (value, value, value)), top1=interval(value)),
        perplexity_base=value,
    )
    page = render_page([wild])
    harmless(page)
    assert pictures(page) == []


def test_names_from_files_are_escaped() -> None:
    bad = gate(
        candidate=f"/x/{HOSTILE}",
        base=HOSTILE,
        environment={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        margin=Margin(0.012, HOSTILE),
        key={"corpus": HOSTILE, "protocol": HOSTILE},
        experts=(ExpertReach(HOSTILE, 2, (1,)),),
        measures=Measures(kl=Kl(HOSTILE, interval(0.1), (0.1, 0.1, 0.1))),
    )
    finding = Finding(HOSTILE, "error", HOSTILE, Where(HOSTILE))
    check = Report("failed", HOSTILE, None, (finding,), (), summary(**{HOSTILE: 1}))
    plot = time_series([Series(HOSTILE, [point(0, 1.0)])], HOSTILE)
    page = render_page([bad, check], [Figure(HOSTILE, HOSTILE, plot)])
    harmless(page)
    assert len(pictures(page)) == 4


def test_the_page_stays_below_two_megabytes_and_says_what_it_left_out() -> None:
    many = [gate(5000, candidate=f"/x/{i}" + "y" * 100) for i in range(70)]
    page = render_page(many)
    harmless(page)
    assert "Left out, so that the page stays below 2 MB" in page
    finding = Finding("QC501", "error", "m" * 5000, Where("t" * 5000))
    page = render_page([Report("failed", "x", None, (finding,) * 5000, ())])
    harmless(page)
    assert "4,800 more findings are not shown" in page


def test_many_cells_keep_the_worst_rows() -> None:
    cells = {(f"layer {r}", f"{c}"): 20.0 + r for r in range(400) for c in range(128)}
    cells["layer 399", "5"] = 1.0
    picture = heat(cells, "x", "dB")
    assert picture.count("<rect") < 6000
    assert "worst: layer 399, 5" in picture
    assert "further rows are not shown" in picture


def test_rows_and_columns_stand_in_natural_order() -> None:
    (picture,) = pictures(
        heat({(f"layer {r}", f"{c}"): r + c for r in (10, 9, 2) for c in (11, 3)}, "x", "dB")
    )
    reported = [e.text for e in picture.iter("text")]
    assert reported.index("layer 2") < reported.index("layer 9") < reported.index("layer 10")
    assert reported.index("3") < reported.index("11")
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
    (picture,) = pictures(time_series([found], "loss"))
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
        forest([Row("x", interval(v, 0.0), v, "passed") for v in values], "nats"),
        time_series(
            [Series("x", [Point(i, v, None, None, "passed", "") for i, v in enumerate(values)])],
            "loss",
        ),
        heat({("r", str(i)): v for i, v in enumerate(values)}, "x", "dB"),
    ]
    for picture in shown:
        assert "nan" not in picture
        assert "inf" not in picture.replace("info", "")
        pictures(picture)
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
    write_result(file, gate())
    for _ in range(3):
        append(history, recorded(gate()))
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
    monkeypatch.delenv("CI", raising=False)
    file, golden = tmp_path / "g.json", tmp_path / "x.golden.json"
    compare_with_golden(gate(), golden)
    assert run(["goldens", "accept", "x", "--reason", "first", "-d", str(tmp_path)]) == 0
    worse = [
        (b, q + t * (0.01 + 0.0001 * (i % 3)), t) for i, (b, q, t) in enumerate(gate().documents)
    ]
    write_result(file, gate(documents=worse))
    args = ["report", str(file), "-o", str(tmp_path / "r.html"), "--golden", str(golden)]
    assert run(args) == 0
    (first, _) = pictures((tmp_path / "r.html").read_text())
    assert "drift of M3-NVFP4" in words(first)
    assert "margin 0.003" in words(first)
    assert "failed" in words(first)
    write_result(file, gate())
    assert run(args) == 0
    assert "Identical to the accepted record" in (tmp_path / "r.html").read_text()


def test_weights_of_a_gate_are_those_that_it_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = GOLDEN / "mxfp8"
    scored = gate(candidate=str(folder), base=str(GOLDEN / "bf16"))
    page, file = tmp_path / "r.html", tmp_path / "g.json"
    args = ["report", str(file), "-o", str(page), "--weights"]
    write_result(file, replace(scored, weights_sha256=open_checkpoint(folder).weights_sha256))
    assert run(args) == 0
    assert "+0.01050 [+0.00850, +0.01250] nats per token" in page.read_text()
    assert "Signal to quantization noise" in page.read_text()
    write_result(file, replace(scored, weights_sha256="0" * 64))
    assert run(args) == 1
    assert "is not the checkpoint of the run: the SHA-256" in capsys.readouterr().err


def test_a_check_is_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["check", str(GOLDEN / "mxfp8"), "--base", str(GOLDEN / "bf16")]
    assert run([*args, "--format", f"json={tmp_path / 'c.json'}"]) == 0
    assert (
        run(["report", str(tmp_path / "c.json"), "-o", str(tmp_path / "r.html"), "--weights"]) == 0
    )
    value = json.loads((tmp_path / "c.json").read_text())
    value["stats"]["bytes"] += 1
    (tmp_path / "other.json").write_text(json.dumps(value))
    other = ["report", str(tmp_path / "other.json"), "-o", str(tmp_path / "o.html"), "--weights"]
    assert run(other) == 1
    assert "is not the checkpoint of the run" in capsys.readouterr().err
    page = (tmp_path / "r.html").read_text()
    harmless(page)
    assert "check PASSED" in page
    assert "Signal to quantization noise by layer and expert" in page
    capsys.readouterr()
