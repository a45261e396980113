# SPDX-License-Identifier: Apache-2.0
"""The history: concurrent writers, torn and hostile lines, trends, change points, exports."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.results import gate_result, interval, summary, write_result
from verifier.cli import run
from verifier.errors import ContentError, MachineError, UsageError
from verifier.evaluation import Drift, Interval, Kl, Margin, Measures
from verifier.findings import Report
from verifier.history import Record, append, load, read_result, recorded
from verifier.history.export import to_bmf, to_csv
from verifier.history.journal import MAX_LINE
from verifier.history.trend import changes, deviations
from verifier.report import render_json

GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"

WRITER = """
import sys
from verifier.history import append, read_result, recorded
run = read_result(sys.argv[2])
for i in range(int(sys.argv[4])):
    append(sys.argv[1], recorded(run, label=f"{sys.argv[3]}-{i}"))
"""


def record(loss: float = 0.007, recipe: str = "", commit: str = "", **changed: Any) -> Record:
    made = recorded(gate_result(loss, **changed))
    options = {"recipe": recipe, "sha256": recipe} if recipe else {}
    return made.model_copy(update={"recipe": options, "commit": commit})


def write(file: Path, *losses: float) -> list[Record]:
    made = [record(x) for x in losses]
    for r in made:
        append(file, r)
    return made


def test_a_gate_is_recorded_with_intervals_and_keys(tmp_path: Path) -> None:
    kl = Kl("lockstep", interval(0.01), (1.0, 0.9, 1.2))
    result = gate_result(
        measures=Measures(kl=kl, top1=interval(0.95, 0.01), flips=3, sure=300),
        drift=Drift("x", Margin(0.003, "default"), interval(0.001)),
    )
    read = read_result(write_result(tmp_path / "run.json", result))
    assert read == result
    append(tmp_path / "h", recorded(read, label="rc1", seconds=7.5))
    (found,) = load(tmp_path / "h").records
    assert (found.kind, found.name, found.verdict) == ("gate", "M3-NVFP4", "passed")
    assert (found.label, found.seconds) == ("rc1", 7.5)
    loss, measures = found.measures["loss"], found.measures
    assert (loss.value, loss.low, loss.high, loss.margin) == (0.007, 0.006, 0.008, 0.077)
    assert measures["drift"].margin == 0.003
    assert (measures["kl"].value, measures["kl_999"].high, measures["flips"].value) == (
        0.01,
        1.2,
        0.01,
    )
    assert found.key == {"protocol": "tokens", "window": 512}
    assert found.environment == {"torch": "2.13.0"}


def test_a_gate_without_statistics_is_recorded_too(tmp_path: Path) -> None:
    result = gate_result(
        outcome="failed",
        interval=None,
        perplexity_base=math.nan,
        perplexity_candidate=math.nan,
        nonfinite=[3],
    )
    read = read_result(write_result(tmp_path / "run.json", result))
    found = recorded(read)
    assert "loss" not in found.measures
    assert "perplexity_base" not in found.measures
    assert found.measures["nonfinite"].value == 1
    assert found.measures == recorded(result).measures


def test_an_interval_without_ends_is_read_and_recorded(tmp_path: Path) -> None:
    """Of one document nothing is known but its loss: infinities are null in JSON."""
    one = Interval(0.01, math.inf, -math.inf, math.inf, 1, 10, math.inf)
    file = write_result(tmp_path / "run.json", gate_result(interval=one))
    assert json.loads(Path(file).read_text())["interval"]["low"] is None
    loss = recorded(read_result(file)).measures["loss"]
    assert (loss.value, loss.low, loss.high, loss.se) == (0.01, None, None, None)


def test_check_appends_by_itself_and_tells_digests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sub" / "h.jsonl"
    for label in ("a", "b"):
        assert (
            run(
                [
                    "check",
                    str(GOLDEN / "mxfp8"),
                    "--history",
                    str(file),
                    "--label",
                    label,
                    "--format",
                    "json",
                ]
            )
            == 0
        )
    json.loads(capsys.readouterr().out.split("}\n{")[0] + "}")  # stdout holds the reports alone
    first, second = load(file).records
    assert (first.kind, first.label, second.label) == ("check", "a", "b")
    assert first.id != second.id
    assert first.series == second.series
    assert first.checkpoint["tensors"] == first.measures["tensors"].value
    assert len(str(first.checkpoint["header_sha256"])) == 64
    assert first.measures["errors"].value == 0
    assert run(["check", str(GOLDEN / "mxfp8"), "--history", str(tmp_path)]) == 2
    assert run(["check", str(GOLDEN / "mxfp8"), "--label", "x"]) == 2


def test_a_check_that_could_not_be_made_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> None:
        raise MachineError("disk")

    monkeypatch.setattr("verifier.run.engine.open_checkpoint", failing)
    assert run(["check", str(GOLDEN / "mxfp8"), "--history", str(tmp_path / "h")]) == 4
    assert [r.verdict for r in load(tmp_path / "h").records] == ["error"]


@pytest.mark.xdist_group("gate")
def test_gate_appends_by_itself_and_is_held_against_its_golden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CI", raising=False)
    args = [
        "gate",
        str(GOLDEN / "mxfp8"),
        "--base",
        str(GOLDEN / "bf16"),
        "--corpus",
        str(GOLDEN / "corpus.jsonl"),
    ]
    args += ["--documents", "3", "--max-increase", "0.5", "--format", "json"]
    args += ["--history", str(tmp_path / "h"), "--golden", str(tmp_path / "g" / "m.golden.json")]
    assert run(args) == 1
    text = capsys.readouterr().out
    printed = json.loads(text)
    (tmp_path / "run.json").write_text(text)
    (found,) = load(tmp_path / "h").records
    assert found.measures["loss"].value == printed["interval"]["delta"]
    assert (found.name, found.key) == ("mxfp8", printed["key"])
    assert found.seconds is not None
    assert run(["goldens", "accept", "m", "--reason", "first", "-d", str(tmp_path / "g")]) == 0
    assert run(["goldens", "test", f"m={tmp_path / 'run.json'}", "-d", str(tmp_path / "g")]) == 0
    assert "identical to the golden" in capsys.readouterr().out


def test_the_recipe_of_an_export_is_told_by_its_manifest(tmp_path: Path) -> None:
    options = {"recipe": "nvfp4_mlp", "kv_cache": None, "layers": [1, 2]}
    (tmp_path / "ckptgate_manifest.json").write_text(json.dumps({"options": options}))
    found = recorded(gate_result(candidate=str(tmp_path)))
    assert {k: v for k, v in found.recipe.items() if k != "sha256"} == {
        "recipe": "nvfp4_mlp",
        "layers": "[1, 2]",
    }


@pytest.mark.parametrize(("old", "new"), [("unproven", "inconclusive"), ("broken", "error")])
def test_a_line_of_version_1_0_is_read_with_the_verdicts_named_as_now(
    tmp_path: Path, old: str, new: str
) -> None:
    line = json.loads(record().model_dump_json()) | {"schema_version": "1.0", "verdict": old}
    file = tmp_path / "history.jsonl"
    file.write_text(json.dumps(line) + "\n")
    found = load(file)
    assert not found.notes
    assert [(r.schema_version, r.verdict) for r in found.records] == [("1.1", new)]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    write_result(tmp_path / "run.json", gate_result())
    args = [sys.executable, "-c", WRITER, str(tmp_path / "h"), str(tmp_path / "run.json")]
    with_env = os.environ | {
        "PATH": "/nonexistent"
    }  # no git: the processes are then at the file more often
    writers = [subprocess.Popen([*args, str(i), "40"], env=with_env) for i in range(4)]
    readers = [len(load(tmp_path / "h").notes) for _ in range(20) if (tmp_path / "h").exists()]
    assert [w.wait() for w in writers] == [0] * 4
    found = load(tmp_path / "h")
    assert sorted(r.label for r in found.records) == sorted(
        f"{i}-{n}" for i in range(4) for n in range(40)
    )
    assert found.notes == []
    assert not any(readers)


def test_a_killed_writer_leaves_whole_lines_and_no_lock(tmp_path: Path) -> None:
    write_result(tmp_path / "run.json", gate_result())
    args = [
        sys.executable,
        "-c",
        WRITER,
        str(tmp_path / "h"),
        str(tmp_path / "run.json"),
        "x",
        "100000",
    ]
    writer = subprocess.Popen(args, env=os.environ | {"PATH": "/nonexistent"})
    while not (tmp_path / "h").exists() or (tmp_path / "h").stat().st_size < 5000:
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    append(tmp_path / "h", record())
    found = load(tmp_path / "h")
    assert found.bad == 0
    assert len(found.records) > 2


def test_a_torn_last_line_is_moved_aside_once_and_said(tmp_path: Path) -> None:
    file = tmp_path / "h"
    write(file, 0.1, 0.2)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:300])
    found = load(file)
    assert [r.measures["loss"].value for r in found.records] == [0.1, 0.2]
    assert len(found.notes) == 1
    assert "torn (300 bytes" in found.notes[0]
    assert file.read_bytes() == whole
    assert (tmp_path / "h.torn").read_bytes() == whole[:300] + b"\n"
    assert load(file).notes == []


def test_appending_after_a_torn_line_does_not_glue(tmp_path: Path) -> None:
    file = tmp_path / "h"
    write(file, 0.1)
    with file.open("ab") as out:
        out.write(b'{"schema_version": "1.0", "id": "01')
    write(file, 0.3)
    assert [r.measures["loss"].value for r in load(file).records] == [0.1, 0.3]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "h"
    write(file, 0.1, 0.2)
    file.write_bytes(file.read_bytes()[:-1])
    found = load(file)
    assert len(found.records) == 2
    assert "had no newline" in found.notes[0]
    assert file.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    "hostile",
    [
        b"{" * 100_000,
        b'{"a":' * 50_000,
        b"[" * 200_000 + b"]" * 200_000,
        b"x" * (MAX_LINE + 10),
        b"x" * (MAX_LINE + 1),
        b"\xff\xfe\x00",
        b'{"id": NaN}',
        b"null",
        b"1" * 5000,
        b'{"schema_version": "9.0"}',
    ],
)
def test_hostile_lines_are_left_out_and_counted(tmp_path: Path, hostile: bytes) -> None:
    file = tmp_path / "h"
    write(file, 0.1)
    with file.open("ab") as out:
        out.write(hostile + b"\n")
    write(file, 0.2)
    found = load(file)
    assert [r.measures["loss"].value for r in found.records] == [0.1, 0.2]
    assert found.bad == 1
    assert found.notes[0].startswith("line 2: ")
    assert len(found.notes[0]) < 500


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"0.1"', "true"])
def test_a_value_that_is_no_finite_number_is_no_measure(tmp_path: Path, value: str) -> None:
    line = record().model_dump_json().replace('"value":0.007', f'"value":{value}')
    assert value in line
    (tmp_path / "h").write_text(line + "\n")
    found = load(tmp_path / "h")
    assert (found.records, found.bad) == ([], 1)


def test_many_bad_lines_are_counted_not_listed(tmp_path: Path) -> None:
    (tmp_path / "h").write_bytes(b"no\n" * 5000)
    found = load(tmp_path / "h")
    assert found.bad == 5000
    assert len(found.notes) < 50


def test_a_line_that_stands_twice_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "h"
    write(file, 0.1)
    file.write_bytes(file.read_bytes() * 2)  # a merge of two branches
    found = load(file)
    assert len(found.records) == 1
    assert "a duplicate of run" in found.notes[0]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError):
            append(bad, record())
        with pytest.raises(UsageError):
            load(bad)
    with pytest.raises(UsageError, match="no history"):
        load(tmp_path / "absent")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    import resource

    file = tmp_path / "h"
    write(file, 0.1)
    whole = file.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))
    try:
        with pytest.raises(MachineError):
            append(file, record())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert file.read_bytes() == whole


def test_the_trend_warns_of_a_loss_beyond_the_spread_of_accepted_runs() -> None:
    quiet = [record(x) for x in (0.0070, 0.0071, 0.0069, 0.0070, 0.0071)]
    assert deviations(quiet) == []
    (warned,) = deviations([*quiet, record(0.0090)])
    assert (warned.measure, warned.median, warned.runs) == ("loss", 0.0070, 5)
    assert deviations([*quiet, record(0.0050)]) == []
    assert deviations([*quiet[:2], record(0.0090)]) == []  # two runs are no trend


def test_failed_runs_and_other_protocols_are_not_what_the_trend_is_taken_from() -> None:
    bad = [record(0.5, outcome="failed") for _ in range(5)]
    other = [record(0.5, key={"protocol": "lm-eval"}) for _ in range(5)]
    good = [record(0.007) for _ in range(4)]
    (warned,) = deviations([*bad, *other, *good, record(0.02)])
    assert warned.median == 0.007


def test_fewer_equal_top_tokens_are_worse_and_more_are_not() -> None:
    runs = [record(measures=Measures(top1=interval(x))) for x in (0.95, 0.95, 0.95, 0.90)]
    assert [w.measure for w in deviations(runs)] == ["top1"]
    assert deviations([*runs[:3], record(measures=Measures(top1=interval(0.99)))]) == []


def test_a_change_point_names_the_recipe_or_the_commit_that_changed() -> None:
    runs = [record(x, "old", "a" * 40) for x in (0.0070, 0.0071, 0.0069, 0.0070)]
    runs += [record(x, "new", "a" * 40) for x in (0.0120, 0.0121, 0.0119, 0.0120)]
    runs += [record(x, "new", "b" * 40) for x in (0.0200, 0.0201, 0.0199, 0.0200)]
    first, second = changes(runs)
    assert (first.run, first.before) == (runs[4], runs[3])
    assert first.because == ("recipe old → new",)
    assert (first.old, first.new) == (pytest.approx(0.007), pytest.approx(0.012))
    assert second.because == (f"commit {'a' * 12} → {'b' * 12}",)


def test_one_bad_run_at_the_end_is_no_level_and_moves_no_change_point() -> None:
    runs = (
        [record(0.0069, "a") for _ in range(4)]
        + [record(0.0054, "b") for _ in range(4)]
        + [record(0.0164, "b")]
    )
    (change,) = changes(runs)
    assert (change.run, change.because) == (runs[4], ("recipe a → b",))


@pytest.mark.parametrize(
    "values", [[1e308, -1e308] * 5, [1e200, 0.0] * 5, [1e308] * 8, [5e-324] * 8]
)
def test_values_at_the_ends_of_a_float_are_no_crash(values: list[float], tmp_path: Path) -> None:
    for value in values:
        append(tmp_path / "h", record(interval=interval(value, 0.0)))
    assert run(["history", "log", "-f", str(tmp_path / "h")]) == 0
    assert run(["history", "plot", "-f", str(tmp_path / "h"), "-o", str(tmp_path / "p.svg")]) == 0
    assert "nan" not in (tmp_path / "p.svg").read_text()


def test_noise_has_no_change_points() -> None:
    import random

    rng = random.Random(5)  # noqa: S311
    assert all(not changes([record(rng.gauss(0.05, 0.004)) for _ in range(30)]) for _ in range(10))


def test_bmf_has_the_last_run_of_each_series_with_its_bounds() -> None:
    found = json.loads(to_bmf([record(0.1), record(0.2), record(0.3, candidate="other")]))
    assert set(found) == {"gate M3-NVFP4", "gate other"}
    loss = found["gate M3-NVFP4"]["loss"]
    assert loss == {
        "value": 0.2,
        "lower_value": pytest.approx(0.199),
        "upper_value": pytest.approx(0.201),
    }
    assert found["gate other"]["perplexity-base"] == {"value": 20.0}
    two = json.loads(to_bmf([record(0.1), record(0.2, key={"protocol": "lm-eval"})]))
    assert len(two) == 2


def test_csv_has_a_row_a_measure_and_no_formula() -> None:
    made = recorded(gate_result(), label='=HYPERLINK("x"),"\n')
    rows = list(csv.DictReader(io.StringIO(to_csv([made]))))
    assert {r["measure"] for r in rows} == set(made.measures)
    assert rows[0]["label"].startswith("'=")
    assert float(rows[0]["value"]) == 0.007


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h.jsonl"
    for i, loss in enumerate((0.007, 0.007, 0.007, 0.03)):
        write_result(tmp_path / f"{i}.json", gate_result(loss))
        assert (
            run(
                [
                    "history",
                    "add",
                    str(tmp_path / f"{i}.json"),
                    "--label",
                    f"n{i}\x1b[31m",
                    "-f",
                    str(file),
                ]
            )
            == 0
        )
    assert "from the median of the last 3 passing runs" in capsys.readouterr().err
    assert run(["history", "log", "-f", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("M3-NVFP4   loss") == 4
    assert "warning  loss +0.03" in out
    assert "\x1b" not in out
    assert run(["history", "show", "-1", "-f", str(file)]) == 0
    assert "+0.03000 [+0.02900, +0.03100], margin 0.07700" in capsys.readouterr().out
    assert run(["history", "compare", "-2", "-1", "-f", str(file)]) == 0
    assert "b - a +0.023" in capsys.readouterr().out
    assert run(["history", "export", "--format", "json", "-f", str(file)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert run(["history", "show", "zz", "-f", str(file)]) == 2
    assert run(["history", "show", "-9", "-f", str(file)]) == 2
    assert run(["history", "log", "--name", "nobody", "-f", str(file)]) == 1
    assert run(["history", "log", "-f", str(tmp_path / "absent")]) == 2


def test_unlike_protocols_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path / "h", record())
    append(tmp_path / "h", record(key={"protocol": "tokens", "window": 256}))
    assert run(["history", "compare", "-2", "-1", "-f", str(tmp_path / "h")]) == 1
    assert "different protocols (window)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"x": 1}', '{"candidate": "x", "key": {}, "interval": NaN}', "[" * 100_000]
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    assert run(["history", "add", str(tmp_path / "r.json"), "-f", str(tmp_path / "h")]) == 1
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("outcome", "fine"),
        ("interval", {"delta": "x"}),
        ("interval", {"delta": True}),
        ("documents", [[1.0, 2.0]]),
        ("documents", None),
        ("key", []),
        ("margin", 0.077),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(
    tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(ContentError, match=field):
        read_result(write_result(tmp_path / "r.json", gate_result(), **{field: value}))


def test_a_field_of_tomorrow_is_ignored(tmp_path: Path) -> None:
    file = write_result(tmp_path / "r.json", gate_result(), a_field_of_tomorrow={"x": [1]})
    assert read_result(file) == gate_result()


def test_a_result_of_version_0_1_is_read(tmp_path: Path) -> None:
    old = {"schema_version": "1.0", "verdict": "unproven", "outcome": "inconclusive"}
    found = recorded(read_result(write_result(tmp_path / "r.json", gate_result(), **old)))
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize(("old", "new"), [("unproven", "inconclusive"), ("broken", "error")])
def test_a_check_of_version_0_1_is_read(tmp_path: Path, old: str, new: str) -> None:
    report = Report(new, "/x/M3", None, (), (), summary(3))  # type: ignore[arg-type]
    value = json.loads(render_json(report)) | {"schema_version": "1.1", "verdict": old}
    (tmp_path / "c.json").write_text(json.dumps(value))
    found = recorded(read_result(tmp_path / "c.json"))
    assert (found.kind, found.verdict, found.measures["tensors"].value) == ("check", new, 3)


def test_a_plot_is_svg_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h"
    assert run(["check", str(GOLDEN / "mxfp8"), "--history", str(file)]) == 0
    plot = ["history", "plot", "--history", str(file), "--measure", "errors", "-o"]
    assert run([*plot, str(tmp_path / "p.png")]) == 2
    assert "give a name that ends in .svg" in capsys.readouterr().err
    assert run([*plot, str(tmp_path / "p.svg")]) == 0
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_a_history_tells_depths_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h"
    for depth in ("header", "payload"):
        check = ["check", str(GOLDEN / "mxfp8"), "--depth", depth, "--history", str(file)]
        assert run(check) == 0
    capsys.readouterr()
    assert run(["history", "log", "--history", str(file)]) == 0
    out = capsys.readouterr().out
    assert "check header" in out
    assert "check payload" in out
    assert len({record.series for record in load(file).records}) == 2


def test_an_exact_divergence_and_a_lower_bound_are_two_measures() -> None:
    names = set()
    for kind in ("lockstep", "a lower bound, from the top 64 tokens"):
        kl = Kl(kind, interval(0.01), (1.0, 0.9, 1.2))
        measures = recorded(gate_result(measures=Measures(kl=kl))).measures
        names.add(frozenset(name for name in measures if name.startswith("kl")))
    assert names == {frozenset({"kl", "kl_999"}), frozenset({"kl_lower", "kl_999_lower"})}


def test_an_export_takes_its_format_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "h"
    assert run(["check", str(GOLDEN / "mxfp8"), "--history", str(file)]) == 0
    export = ["history", "export", "--history", str(file)]
    assert run([*export, "-o", str(tmp_path / "x.csv")]) == 0
    assert (tmp_path / "x.csv").read_text().startswith("id,")
    assert run(export) == 2
    assert run([*export, "-o", str(tmp_path / "x.txt")]) == 2
